"""Megatron's tensor-parallel layers on adjoint pairs of collectives: right for any order of derivative."""

from janus.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, megatron_group
from janus.tensor_parallel.norm import parallel_gated_norm

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "megatron_group",
    "parallel_gated_norm",
]
