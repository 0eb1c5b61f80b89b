"""The launch scripts under a Slurm that is not there: stand-ins for its commands write down what they were told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
JOB = EXAMPLES / "slurm_pretrain.sbatch"
MEGATRON = EXAMPLES / "pretrain_megatron.sh"

# What srun does with its options and the command; the status is that of the worst process.
SRUN = """#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1 if "=" in words[0] else 2:]
names = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK")
record = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}
open(os.environ["RECORD"], "a").write(json.dumps(["srun", record]) + "\\n")
if os.environ.get("TELL_THE_SCRIPT"):
    os.kill(os.getppid(), signal.SIGTERM)
if os.environ.get("RUN_TASK"):
    task = {{"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}}
    sys.exit(subprocess.run(words, env=os.environ | task).returncode)
sys.exit(int(os.environ["STATUS"]))
"""
SCONTROL = """#!{python}
import json, os, sys
open(os.environ["RECORD"], "a").write(json.dumps(["scontrol", sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("gpu07\\ngpu08")
"""
# In place of the interpreter: says how it was started.
PYTHON = """#!{python}
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTHONPATH")
record = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}
open(os.environ["RECORD"], "a").write(json.dumps(["python", record]) + "\\n")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job with two machines; its commands are the stand-ins."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RECORD": str(tmp_path / "record"),
        "STATUS": "0",
        "TRAIN": "a.h5 b.h5",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_CPUS_PER_TASK": "8",
    }


def submit(environment: dict[str, str], *arguments: str, **variables: str) -> tuple[int, list[tuple[str, object]], str]:
    """Exit status, what was called, and what was said on stderr."""
    done = subprocess.run(
        ["bash", str(JOB), *arguments],
        env=environment | variables,
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    record = Path(environment["RECORD"])
    lines = record.read_text().splitlines() if record.exists() else []
    return done.returncode, [tuple(json.loads(line)) for line in lines], done.stderr


def requeues(calls: Sequence[tuple[str, object]]) -> list[object]:
    return [words for name, words in calls if name == "scontrol" and "requeue" in words]  # type: ignore[operator]


def test_a_finished_run_ends_the_job(environment: dict[str, str]) -> None:
    status, calls, _ = submit(environment, "--optim.lr", "1e-4", VALID="v.h5", OUTPUT="runs/one")
    assert (status, requeues(calls)) == (0, [])
    (srun,) = [record for name, record in calls if name == "srun"]
    words = srun["arguments"]  # type: ignore[index]
    assert words[words.index("python") :] == [
        *("python", "-m", "matris", "train", "--config", "examples/configs/matris.yaml"),
        *("--training.output", "runs/one", "--data.num_workers", "6", "--data.train", "a.h5", "b.h5"),
        *("--data.valid", "v.h5", "--optim.lr", "1e-4"),
    ]
    assert srun["environment"] == {  # type: ignore[index]
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + 4711),
        "OMP_NUM_THREADS": "8",
        "SRUN_CPUS_PER_TASK": "8",
    }


def test_a_stopped_run_is_queued_again(environment: dict[str, str]) -> None:
    status, calls, _ = submit(environment, STATUS="143", SLURM_RESTART_COUNT="2")
    assert (status, requeues(calls)) == (143, [["requeue", "4711"]])


@pytest.mark.parametrize("failure", ["1", "2", "137"])
def test_a_failed_run_is_not(environment: dict[str, str], failure: str) -> None:
    status, calls, said = submit(environment, STATUS=failure)
    assert (status, requeues(calls)) == (int(failure), [])
    assert f"failed with status {failure}" in said


def test_requeues_are_counted(environment: dict[str, str]) -> None:
    status, calls, said = submit(environment, STATUS="143", MAX_REQUEUES="3", SLURM_RESTART_COUNT="3")
    assert (status, requeues(calls)) == (1, [])
    assert "MAX_REQUEUES" in said


def test_machines_that_fail_again_and_again_end_the_job(environment: dict[str, str]) -> None:
    """Slurm queues such a job again by itself."""
    status, calls, said = submit(environment, MAX_REQUEUES="3", SLURM_RESTART_COUNT="4")
    assert (status, calls) == (1, [])
    assert "MAX_REQUEUES" in said


def test_a_cancelled_job_stays_cancelled(environment: dict[str, str]) -> None:
    status, calls, said = submit(environment, STATUS="143", TELL_THE_SCRIPT="1")
    assert (status, requeues(calls)) == (143, [])
    assert "not queued again" in said


def test_a_container_and_its_mounts(environment: dict[str, str]) -> None:
    _, calls, _ = submit(environment, CONTAINER="image.sqsh", MOUNTS="/data:/data")
    words = next(record["arguments"] for name, record in calls if name == "srun")  # type: ignore[index]
    before = words[: words.index("python")]
    assert before[before.index("--container-image") + 1] == "image.sqsh"
    assert before[before.index("--container-mounts") + 1] == "/data:/data"


def test_without_data_nothing_starts(environment: dict[str, str]) -> None:
    status, calls, said = submit({name: value for name, value in environment.items() if name != "TRAIN"})
    assert status != 0
    assert "TRAIN" in said
    assert not any(name == "srun" for name, _ in calls)


def test_a_megatron_job_under_slurm(environment: dict[str, str]) -> None:
    """Each task is a rank, by the variables that Megatron reads."""
    status, calls, _ = submit(
        environment, "--train-iters", "9", COMMAND="bash examples/pretrain_megatron.sh", RUN_TASK="1", MEGATRON="/lm"
    )
    assert status == 0
    (python,) = [record for name, record in calls if name == "python"]
    words, variables = python["arguments"], python["environment"]  # type: ignore[index]
    assert words[:2] == ["-m", "matris.megatron"]
    assert words[-2:] == ["--train-iters", "9"]
    assert words[words.index("--data.train") + 1 :][:2] == ["a.h5", "b.h5"]
    assert words[words.index("--load") + 1] == words[words.index("--save") + 1] == "runs/megatron"
    assert variables == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": "/lm",
    }


def test_a_megatron_job_on_one_machine(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(MEGATRON)], env=environment | {"NPROC": "4"}, check=False, timeout=60)
    assert done.returncode == 0
    ((_, python),) = [json.loads(line) for line in Path(environment["RECORD"]).read_text().splitlines()]
    assert python["arguments"][:6] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"),
        "-m",
    ]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    checks = [["bash", "-n", str(script)]]
    if shutil.which("shellcheck"):
        checks.append(["shellcheck", "--shell=bash", str(script)])
    for check in checks:
        done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists(), reason="GPUs have an allocator of their own"
)
@pytest.mark.parametrize(
    ("listed", "given", "chosen"),
    [
        ("\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => {library}\n", {}, {"LD_PRELOAD": "{library}"}),
        (
            "\tlibc.so.6 (libc6) => /lib/libc.so.6\n",
            {},
            {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"},
        ),
        ("\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => {library}\n", {"LD_PRELOAD": ""}, {"LD_PRELOAD": ""}),
        ("", {}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}),
        ("", {"GLIBC_TUNABLES": "glibc.malloc.mxfast=8"}, {"GLIBC_TUNABLES": "glibc.malloc.mxfast=8"}),
    ],
)
def test_allocator(tmp_path: Path, listed: str, given: dict[str, str], chosen: dict[str, str]) -> None:
    library = "/nowhere/libtcmalloc_minimal.so.4"  # which the loader then does without, and says so
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text(f"#!/bin/sh\nprintf '%s' '{listed.format(library=library)}'\nseq 100000; exit 127\n")
    ldconfig.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {EXAMPLES / 'allocator.sh'}; env"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    names = ("LD_PRELOAD", "GLIBC_TUNABLES")
    assert {name: variables[name] for name in names if name in variables} == {
        name: value.format(library=library) for name, value in chosen.items()
    }
