"""Launch variables, devices and sizes; groups of several ranks are tested in tests/parallel."""

from __future__ import annotations

import pytest
import torch

from janus.comm.local import find_port
from janus.mesh import Mesh, first_host, open_mesh, pick_device, read_launch


def test_plain_python_is_one_rank_without_torch_distributed() -> None:
    launch = read_launch({})
    assert (launch.rank, launch.world_size, launch.local_rank) == (0, 1, 0)
    with open_mesh("cpu") as mesh:
        assert mesh == Mesh()
        assert mesh.is_main
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            ("torchrun", 3, 4, 1, "a", 7),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_NODELIST": "gpu[03-04],x",
                "SLURM_JOB_ID": "7",
            },
            ("Slurm", 5, 8, 1, "gpu03", 20007),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"},
            ("Slurm", 0, 2, 0, "h", 9),
        ),
        # torchrun inside of a Slurm job
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            ("torchrun", 1, 2, 1, "127.0.0.1", 29500),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("Open MPI", 1, 2, 1, "127.0.0.1", 29500),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "h"},
            ("MPI (PMI)", 1, 2, 0, "h", 29500),
        ),
        # an interactive allocation, in which plain python is one process
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, ("python", 0, 1, 0, "127.0.0.1", 29500)),
    ],
)
def test_launchers(variables: dict[str, str], expected: tuple[str, int, int, int, str, int]) -> None:
    launch = read_launch(variables)
    found = (launch.launcher, launch.rank, launch.world_size, launch.local_rank, launch.address, launch.port)
    assert found == expected


@pytest.mark.parametrize(
    ("node_list", "host"),
    [("a", "a"), ("a1,b2", "a1"), ("n[001-004,007],m3", "n001"), ("gpu-[3,5]", "gpu-3"), ("r[1-2]n[7-9]", "r1n7")],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "without MASTER_ADDR",
        ),
    ],
)
def test_wrong_variables_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(variables)


def test_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match="pipeline axis is 2: only 1 is supported"), open_mesh("cpu", pipeline=2):
        pass


@pytest.mark.parametrize("axis", ["shard", "graph", "tensor", "expert"])
def test_layouts_that_do_not_fit_are_refused_with_the_numbers(axis: str) -> None:
    with pytest.raises(ValueError, match=rf"1 ranks do not divide into .*{axis} 2.* = 2 ranks"):
        open_mesh("cpu", **{axis: 2}).__enter__()
    with pytest.raises(ValueError, match=f"{axis} axis is 0: it must be at least 1"):
        open_mesh("cpu", **{axis: 0}).__enter__()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match="allowed are auto, cpu and cuda"):
        pick_device("tpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        pick_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank 2 has no GPU"):
        pick_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto", 3, bound=True) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="local rank 3 has no GPU"):
        pick_device("auto", 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    port = find_port()
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=rf"rank {rank}: the 2 ranks \(torchrun\) did not meet at 127.0.0.1"):
        open_mesh("cpu", timeout_minutes=0.02).__enter__()
