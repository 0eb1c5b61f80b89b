"""Linear layers and embedding whose weights are split over the tensor axis.

Constructors, initialisation and `sharded_state_dict` are Megatron's. Its forward passes are replaced: they are wrong at
the second derivative, and compute weight gradients during the force pass (docs/decisions/derivatives.md).

A seed gives the same weights for every number of ranks: each rank draws the whole matrix and keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from janus.comm.adjoint import copy, reduce, reduce_scatter
from janus.megatron_import import megatron_import
from janus.mesh import Axis
from janus.ops.product import linear

with megatron_import():
    from megatron.core import tensor_parallel as megatron
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class ColumnParallelLinear(megatron.ColumnParallelLinear):
    """y = x W^T (+ b) with the rows of W, hence the columns of y, split over the ranks. (..., in) to (..., out / W).

    Args:
        tensor: the axis.
        stride: in how many equal runs of rows the split is made; with 2 each rank has a piece of the first half of the
            outputs and the same piece of the second half, in that order.
        bound: weights and bias start uniformly in [-bound, bound]; in_features^-0.5 by default, as in torch.
        matmul_dtype: format of the product, see `janus.ops.product.linear`.
        disable_grad_reduce: the input was copied already (`janus.comm.adjoint.copy`), so that several layers share one
            all-reduce of its gradient.

    Raises:
        ValueError: the outputs do not divide.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = False,
        stride: int = 1,
        bound: float | None = None,
        matmul_dtype: torch.dtype | None = None,
        disable_grad_reduce: bool = False,
    ) -> None:
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}: checkpoints know 1 and 2 (the halves of a gated unit)")
        _check_divides(out_features, stride, tensor, "output features")
        init = _uniform(in_features**-0.5 if bound is None else bound)
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=init,
            bias=bias,
            stride=stride,
            disable_grad_reduce=disable_grad_reduce,
            tp_group=megatron_group(tensor),
        )
        self.tensor, self.stride, self.matmul_dtype = tensor, stride, matmul_dtype
        _forget_extra_state(self)
        if bias:
            _fill_bias(self.bias, init(torch.empty(out_features)), tensor, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The gradient of `x` is all-reduced, unless `disable_grad_reduce`."""
        x = x if self.disable_grad_reduce else copy(x, self.tensor)
        return linear(x, self.weight, self.bias, dtype=self.matmul_dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Megatron's; two runs are described as it does the halves of its gated linear units."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.stride == 1:
            return found
        return {name: apply_swiglu_sharded_factory(value, sharded_offsets) for name, value in found.items()}

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class RowParallelLinear(megatron.RowParallelLinear):
    """y = x W^T (+ b) with the columns of W split over the ranks, as those of x are. (..., in / W) to (..., out).

    Args:
        tensor, bound, matmul_dtype: as in `ColumnParallelLinear`.
        scatter_output: reduce-scatter the output instead of all-reducing it: (..., out / W), the bias split likewise.

    Raises:
        ValueError: the inputs (with `scatter_output` the outputs) do not divide.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = False,
        bound: float | None = None,
        matmul_dtype: torch.dtype | None = None,
        scatter_output: bool = False,
    ) -> None:
        _check_divides(in_features, 1, tensor, "input features")
        if scatter_output:
            _check_divides(out_features, 1, tensor, "output features")
        init = _uniform(in_features**-0.5 if bound is None else bound)
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=init,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=megatron_group(tensor),
        )
        self.tensor, self.matmul_dtype, self.scatter_output = tensor, matmul_dtype, scatter_output
        _forget_extra_state(self)
        if bias:
            whole = init(torch.empty(out_features))
            if scatter_output:
                self.bias = nn.Parameter(torch.empty(out_features // tensor.size, dtype=config.params_dtype))
                set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
                _fill_bias(self.bias, whole, tensor, 1)
            else:
                self.bias.data.copy_(whole)

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        """All-reduces the output, or reduce-scatters it with `scatter_output`.

        Args:
            others: (..., out) partial sums of other products, which share the collective.
        """
        if self.tensor.size == 1:
            y = linear(x, self.weight, self.bias, dtype=self.matmul_dtype)
            return y if others is None else y + others
        partial = linear(x, self.weight, dtype=self.matmul_dtype)
        partial = partial if others is None else partial + others
        if self.scatter_output:
            y = reduce_scatter(partial, self.tensor, dim=partial.ndim - 1)
        else:
            y = reduce(partial, self.tensor)
        return y if self.bias is None else y + self.bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Megatron's, which takes the bias for replicated, with the bias split where it is."""
        if not self.scatter_output:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=None if metadata is None else metadata["dp_cp_group"],
        )

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class VocabParallelEmbedding(megatron.VocabParallelEmbedding):
    """Rows of a table that is split by rows. (N,) int64 to (N, width), replicated.

    Args:
        tensor: the axis; must divide `num_embeddings`.
    """

    def __init__(self, config: ModelParallelConfig, num_embeddings: int, width: int, *, tensor: Axis) -> None:
        _check_divides(num_embeddings, 1, tensor, "embeddings")
        super().__init__(
            num_embeddings, width, init_method=nn.init.normal_, config=config, tp_group=megatron_group(tensor)
        )
        self.tensor = tensor

    def forward(self, index: Tensor) -> Tensor:
        """All-reduces the rows, of which each rank has its own and zeros."""
        start, end = self.vocab_start_index, self.vocab_end_index
        is_here = (index >= start) & (index < end)
        rows = functional.embedding((index - start).where(is_here, 0), self.weight)
        return reduce(rows * is_here[:, None], self.tensor)


def megatron_group(tensor: Axis) -> Any:
    """The axis as Megatron's `tp_group`."""
    return _OneRank() if tensor.group is None else tensor.group


class _OneRank:
    """Stands for a process group of this rank alone: Megatron takes None for its global tensor-parallel group."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _uniform(bound: float) -> Callable[[Tensor], Tensor]:
    def fill(weight: Tensor) -> Tensor:
        return nn.init.uniform_(weight, -bound, bound)

    return fill


def _fill_bias(bias: Tensor, whole: Tensor, tensor: Axis, stride: int) -> None:
    """This rank's piece of each of `stride` runs."""
    bias.data.copy_(whole.view(stride, tensor.size, -1)[:, tensor.rank].reshape(-1))


def _forget_extra_state(layer: nn.Module) -> None:
    """Megatron keeps an empty entry in state dicts for another library's layers; here names are those of weights."""
    layer._load_state_dict_pre_hooks.clear()


def _check_divides(size: int, stride: int, tensor: Axis, what: str) -> None:
    if size % (stride * tensor.size):
        raise ValueError(
            f"{size} {what} do not divide into {stride * tensor.size} equal parts for {tensor.size} tensor-parallel "
            "ranks: choose a width that does, or fewer ranks"
        )
