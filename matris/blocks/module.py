"""What every block is built from: the Megatron configuration, linear layers and perceptrons."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from janus.ops.gated_norm import gated_norm
from janus.ops.product import linear
from janus.ops.silu import silu
from matris.config import ModelConfig, NormType

# All imports of Megatron's modules are here, because the first one warns of optional packages that are not needed.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.module import MegatronModule as MegatronModule


@dataclass
class MatRISConfig(ModelParallelConfig):
    """Megatron's configuration of a module, with MatRIS's hyper-parameters.

    Not frozen, and with two fields that MatRIS never sets, because Megatron's classes ask for that.

    Attributes:
        model: hyper-parameters.
        matmul_dtype: number format of matrix products, None for that of the parameters.
        fp8, fp4: always None; `MegatronModule` reads them.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    matmul_dtype: torch.dtype | None = None
    fp8: None = None
    fp4: None = None


class Linear(nn.Linear):
    """y = x W^T (+ b), the product in the configured number format. Shapes (..., in) to (..., out)."""

    def __init__(self, config: MatRISConfig, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.matmul_dtype = config.matmul_dtype

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, dtype=self.matmul_dtype)


class MLP(MegatronModule):
    """Linear layers with SiLU between them.

    Args:
        sizes: widths, input first, output last.
        bias: whether every layer has a bias.
    """

    def __init__(self, config: MatRISConfig, sizes: Sequence[int], *, bias: bool) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Linear(config, n, m, bias=bias) for n, m in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """(N, sizes[0]) to (N, sizes[-1])."""
        for layer in self.layers[:-1]:
            x = silu(layer(x))
        return self.layers[-1](x)


class Norm(MegatronModule):
    """Layer norm (eps 1e-5, with bias) or RMS norm (machine eps, without), over the last axis."""

    def __init__(self, config: MatRISConfig, norm_type: NormType, width: int) -> None:
        super().__init__(config)
        self.center = norm_type is NormType.layer
        self.eps = norm_eps(norm_type, config.params_dtype)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.center else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to (N, width)."""
        if self.center:
            x = x - x.mean(dim=-1, keepdim=True)
        x = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return x if self.bias is None else x + self.bias


class GatedMLP(MegatronModule):
    """SiLU(norm(core(x))) * sigmoid(norm(gate(x))) of a concatenation x of features that is never formed.

    A linear layer of concatenated features is the sum of linear layers of the parts, so a part that belongs to nodes is
    multiplied once per node and gathered afterwards, and core and gate share each product: the output of each inner
    layer is the core's half, then the gate's.

    Args:
        num_parts: how many features of width `hidden_size` are concatenated.
    """

    def __init__(self, config: MatRISConfig, num_parts: int) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        norm_type = config.model.norm_type
        self.width = width
        self.inner = nn.ModuleList(Linear(config, width, 2 * width, bias=part == 0) for part in range(num_parts))
        for layer in self.inner:
            # torch's default for the one layer that these are together.
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -((num_parts * width) ** -0.5), (num_parts * width) ** -0.5)
        self.core = Linear(config, width, width, bias=True)
        self.gate = Linear(config, width, width, bias=True)
        self.center = norm_type is NormType.layer
        self.eps = norm_eps(norm_type, config.params_dtype)
        self.norm_weight = nn.Parameter(torch.ones(2, width))
        self.norm_bias = nn.Parameter(torch.zeros(2, width)) if self.center else None

    def project(self, part: int, x: Tensor) -> Tensor:
        """What part number `part` adds to the inner layer: (N, width) to (N, 2 width). Part 0 brings the bias."""
        return self.inner[part](x)

    def finish(self, inner: Tensor) -> Tensor:
        """From the summed projections (N, 2 width) to the output (N, width)."""
        core, gate = silu(inner).split(self.width, dim=1)
        return gated_norm(
            self.core(core), self.gate(gate), self.norm_weight, self.norm_bias, eps=self.eps, center=self.center
        )


def norm_eps(norm_type: NormType, dtype: torch.dtype) -> float:
    """What the two norms add to the variance: torch's defaults, which released weights were trained with."""
    return 1e-5 if norm_type is NormType.layer else torch.finfo(dtype).eps
