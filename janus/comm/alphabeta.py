"""Time of collectives on a machine by the alpha-beta model: a latency for each message, and bytes over bandwidth.

A collective over W ranks that lie k to a node sends its messages one after the other in ceil(log2 W) rounds at best,
and in W - 1 (a ring; for an all-to-all a message for each rank) at worst; an all-reduce goes up and down a tree, twice
ceil(log2 W). Rings that leave the node use the k adapters of the node that belong to them, so their bytes pass at the
smaller of the link in the node and k times the one between nodes. Of an all-to-all the rows for other nodes leave by
the device's own adapter while the others are exchanged in the node. Links are free of other traffic: congestion is not
in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from janus.comm.traffic import Traffic
from janus.grid import Grid
from janus.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the ranks of an axis are.

    Attributes:
        size: number of ranks.
        in_node: how many of them lie in one node.
    """

    size: int
    in_node: int


def places(grid: Grid, devices_per_node: int) -> dict[str, Place]:
    """Of all axes of a grid whose ranks fill one node after the other, by the axes' names."""

    def in_node(stride: int, size: int) -> int:
        return max(1, min(size, devices_per_node // stride))

    def place(stride: int, size: int) -> Place:
        return Place(size=size, in_node=in_node(stride, size))

    tensor, graph, shard, data = grid.tensor, grid.graph, grid.shard, grid.data
    inner, replicas = graph * tensor, data * shard * graph
    return {
        "tensor": place(1, tensor),
        "graph": place(tensor, graph),
        "shard": place(inner, shard),
        "replicas": place(tensor, replicas),
        "shard_replicas": Place(size=data * graph, in_node=in_node(tensor, graph) * in_node(inner * shard, data)),
        "expert": place(tensor, grid.expert),
        "expert_replicas": place(tensor * grid.expert, replicas // grid.expert),
    }


def seconds(traffic: Traffic, where: Mapping[str, Place], machine: Machine, *, optimistic: bool) -> dict[str, float]:
    """Time of each kind of collective, by its key (`axis/name`), one after the other.

    Args:
        where: place of each axis.
        optimistic: which end of the machine's band, and whether messages take few rounds.
    """
    share = machine.shares.links.high if optimistic else machine.shares.links.low
    found = {}
    for key, calls in traffic.calls.items():
        axis, _, collective = key.partition("/")
        place = where[axis]
        link = machine.in_node if place.in_node == place.size else machine.between_nodes
        latency = 1e-6 * link.latency_us * _rounds(collective, place.size, optimistic=optimistic)
        moving = _seconds_of_bytes(collective, traffic.wire_bytes[key], place, machine)
        found[key] = calls * latency + moving / share
    return found


def _rounds(collective: str, size: int, *, optimistic: bool) -> int:
    rounds = math.ceil(math.log2(size))
    if collective == "all_reduce":
        return 2 * rounds
    return rounds if optimistic else size - 1


def _seconds_of_bytes(collective: str, num_bytes: float, place: Place, machine: Machine) -> float:
    """At the full bandwidth of links."""
    inside, between = 1e9 * machine.in_node.GB_per_s, 1e9 * machine.between_nodes.GB_per_s
    if place.in_node == place.size:
        return num_bytes / inside
    if collective == "all_to_all":
        leaving = num_bytes * (place.size - place.in_node) / (place.size - 1)
        return max(leaving / between, (num_bytes - leaving) / inside)
    return num_bytes / min(inside, place.in_node * between)
