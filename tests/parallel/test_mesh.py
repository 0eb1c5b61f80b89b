"""The rank grid over several ranks."""

from __future__ import annotations

import pytest

from janus.mesh import Axis, Mesh
from tests.parallel.ranks import run_ranks


def members(mesh: Mesh) -> dict[str, tuple[int, tuple[int, ...]]]:
    axes = [value for value in vars(mesh).values() if isinstance(value, Axis)]
    assert all(axis.members[axis.rank] == mesh.rank and len(axis.members) == axis.size for axis in axes)
    assert all((axis.group is None) == (axis.size == 1) for axis in axes)
    return {axis.name: axis.members for axis in axes}


def test_groups_of_eight_ranks() -> None:
    found = run_ranks(8, members, layout={"shard": 2, "tensor": 2})
    assert found[5] == {  # data 1, shard 0, graph 0, tensor 1
        "data": (1, 5),
        "shard": (5, 7),
        "graph": (5,),
        "tensor": (4, 5),
        "batch": (1, 3, 5, 7),
        "replicas": (1, 3, 5, 7),
        "shard_replicas": (1, 5),
        "expert": (5,),
        "expert_replicas": (1, 3, 5, 7),
    }
    found = run_ranks(8, members, layout={"shard": 2, "graph": 2, "tensor": 2, "expert": 2})
    assert found[6] == {  # shard 1, graph 1, tensor 0
        "data": (6,),
        "shard": (2, 6),
        "graph": (4, 6),
        "tensor": (6, 7),
        "batch": (2, 6),
        "replicas": (0, 2, 4, 6),
        "shard_replicas": (4, 6),
        "expert": (4, 6),
        "expert_replicas": (2, 6),
    }


def test_experts_are_shared_by_runs_of_ranks_whatever_else_these_share() -> None:
    found = run_ranks(8, members, layout={"shard": 2, "expert": 4, "tensor": 2})
    assert found[5]["expert"] == (1, 3, 5, 7)
    assert found[5]["expert_replicas"] == (5,)
    found = run_ranks(8, members, layout={"shard": 4, "expert": 2})
    assert found[5]["shard"] == (4, 5, 6, 7)
    assert found[5]["expert"] == (4, 5)
    assert found[5]["expert_replicas"] == (1, 3, 5, 7)


@pytest.mark.parametrize(("layout", "axis"), [({}, "data"), ({"graph": 4}, "graph"), ({"tensor": 4}, "tensor")])
def test_one_axis_takes_all_ranks(layout: dict[str, int], axis: str) -> None:
    for found in run_ranks(4, members, layout=layout):
        assert found[axis] == (0, 1, 2, 3)
        assert sum(len(found[name]) for name in ("data", "shard", "graph", "tensor")) == 7
