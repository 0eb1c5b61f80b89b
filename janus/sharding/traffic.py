"""Collectives of weights and their gradients in a step, by formula, from the sizes of what is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from janus.comm.traffic import SizedAxis, Traffic

_NORM_BYTES = 8
"""Of a sum of squares, float64."""


@dataclass(frozen=True, kw_only=True)
class UnitSize:
    """A flat buffer that the ranks of the shard axis share.

    Attributes:
        num_bytes: of the whole buffer on one tensor rank, padded to equal pieces.
        in_force_pass: whether the force pass uses it, that is, whether what it computes depends on the positions.
    """

    num_bytes: int
    in_force_pass: bool = True

    @staticmethod
    def of(num_bytes: int, shards: int, *, itemsize: int, in_force_pass: bool) -> UnitSize:
        """Of weights of so many bytes in all, before they are padded."""
        held = -(-num_bytes // (itemsize * shards))
        return UnitSize(num_bytes=itemsize * shards * held, in_force_pass=in_force_pass)


@dataclass(frozen=True, kw_only=True)
class WeightAxes:
    """The axes over which weights, gradients and their norm travel; named as in `janus.mesh.Mesh`."""

    shard: SizedAxis
    tensor: SizedAxis
    replicas: SizedAxis
    shard_replicas: SizedAxis
    expert: SizedAxis
    expert_replicas: SizedAxis


def weight_traffic(
    units: Sequence[UnitSize],
    axes: WeightAxes,
    *,
    whole_bytes: int,
    expert_bytes: Sequence[int] = (),
    policy: Literal["regather", "keep"],
    micro_batches: int,
) -> Traffic:
    """Of a step with clipping; what sharded experts gather as planned is not in it (`janus.expert_parallel.traffic`).

    Args:
        units: empty without a shard axis.
        whole_bytes: of trainable weights that every rank has, on one tensor rank.
        expert_bytes: of what a rank holds of experts over the expert axis: one number for all that are at home, or one
            for each site whose experts are in pieces.
    """
    traffic = Traffic()
    for unit in units:
        gathers = 1 if policy == "keep" else micro_batches * (3 if unit.in_force_pass else 2)
        traffic.all_gather(axes.shard, gathers, unit.num_bytes)
        traffic.reduce_scatter(axes.shard, micro_batches, unit.num_bytes)
        traffic.all_reduce(axes.shard_replicas, 1, unit.num_bytes // axes.shard.size)
    traffic.all_reduce(axes.replicas, int(whole_bytes > 0), whole_bytes)
    for num_bytes in expert_bytes:
        traffic.all_reduce(axes.expert_replicas, 1, num_bytes)
    if max(axes.shard.size, axes.tensor.size, axes.expert.size) > 1:
        traffic.all_reduce(axes.tensor, 1, 3 * _NORM_BYTES)
        traffic.all_reduce(axes.shard, 1, _NORM_BYTES)
        traffic.all_reduce(axes.expert, 1, _NORM_BYTES)
    return traffic
