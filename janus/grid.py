"""Which sizes of the axes so many ranks can have. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of the axes data, shard, graph and tensor, which multiply to the number of ranks; the last is the fastest.

    Attributes:
        data, shard, graph, tensor: as in `janus.mesh.Mesh`.
        expert: ranks that share the experts, a run of those of data, shard and graph.
    """

    data: int
    shard: int
    graph: int
    tensor: int
    expert: int

    @staticmethod
    def of(world_size: int, *, shard: int, graph: int, tensor: int, expert: int, pipeline: int) -> Grid:
        """The layout of so many ranks, or a ValueError that says what would fit."""
        for axis, size in (("shard", shard), ("graph", graph), ("tensor", tensor), ("expert", expert)):
            if size < 1:
                raise ValueError(f"parallel size of the {axis} axis is {size}: it must be at least 1")
        if pipeline != 1:
            raise ValueError(f"parallel size of the pipeline axis is {pipeline}: only 1 is supported by this version")
        inner = shard * graph * tensor
        if world_size % inner:
            raise ValueError(
                f"{world_size} ranks do not divide into shard {shard} x graph {graph} x tensor {tensor} = {inner} "
                f"ranks per replica: start a multiple of {inner} ranks, or choose smaller sizes"
            )
        if world_size % (expert * tensor):
            raise ValueError(
                f"{world_size} ranks do not divide into expert {expert} x tensor {tensor} = {expert * tensor} ranks "
                f"that share the experts: start a multiple of {expert * tensor} ranks, or choose a smaller expert size"
            )
        return Grid(data=world_size // inner, shard=shard, graph=graph, tensor=tensor, expert=expert)
