"""Running chains of element-wise operations on slices of rows that stay in cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from janus.ops.fused import kernels_in_use

_SLICE_ELEMENTS = 1 << 18
"""Elements of one slice of one tensor: a chain's dozen temporaries of this size stay in the shared cache."""

_WHOLE_ELEMENTS = 1 << 20
"""Tensors up to this size are not sliced: joining the results would cost more than the cache gains."""


def map_rows(function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], num_summed: int = 0):
    """Apply a function that treats rows independently, slice by slice on CPU and at once elsewhere.

    Temporaries of `function` are as large as a slice, so a chain of operations costs one pass over memory and no more
    memory than its results. A kernel that is compiled as a whole has no temporaries, so it runs at once. Not recorded
    by autograd: for use inside autograd functions.

    Args:
        function: from slices of `rows` to a tuple of tensors; the last `num_summed` of them are sums over the rows.
        rows: tensors of equal first dimension (N, ...); the first one's size decides the slices.
    Returns:
        results over all rows, (N, ...), then the sums.
    """
    num_rows = rows[0].shape[0]
    being_traced = get_proxy_mode() is not None  # for any number of rows
    at_once = kernels_in_use() != "torch" or rows[0].device.type != "cpu"
    if being_traced or at_once or rows[0].numel() <= _WHOLE_ELEMENTS:
        return function(*rows)
    step = max(1, _SLICE_ELEMENTS // rows[0][0].numel())
    outputs: list[Tensor] = []
    for start in range(0, num_rows, step):
        parts = function(*(tensor[start : start + step] for tensor in rows))
        num_mapped = len(parts) - num_summed
        if not outputs:
            outputs = [part.new_empty((num_rows, *part.shape[1:])) for part in parts[:num_mapped]]
            outputs += [torch.zeros_like(part) for part in parts[num_mapped:]]
        for index, part in enumerate(parts):
            if index < num_mapped:
                outputs[index][start : start + step] = part
            else:
                outputs[index] += part
    return tuple(outputs)


def with_unit_stride(rows: Tensor) -> Tensor:
    """The same (N, d), with the channels of a row beside each other. Rows may be apart, as in half of a product."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def empty_part(x: Tensor, parts: int) -> Tensor:
    """Room for one of the parts that the columns of x (N, parts d) are divided into, (N, d); one part is as x is."""
    return x.new_empty(x.shape if parts == 1 else (len(x), x.shape[1] // parts))
