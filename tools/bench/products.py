"""FLOPs of matrix products that a program computes, counted as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Products(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, whose hooks on modules forbid derivatives inside of a pass.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(function: Callable[[], Any]) -> int:
    """Of one call."""
    with Products() as products:
        function()
    return products.flops
