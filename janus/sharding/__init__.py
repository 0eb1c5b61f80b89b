"""Weights as their ranks hold them: sharded flat buffers for any order of derivative, and the logical tensors."""

from janus.sharding.logical import Split, part_of, split_of
from janus.sharding.memory import WeightMemory, weight_memory
from janus.sharding.weights import Policy, Weights

__all__ = ["Policy", "Split", "WeightMemory", "Weights", "part_of", "split_of", "weight_memory"]
