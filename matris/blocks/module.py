"""What every block is built from: the Megatron configuration, linear layers and perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from janus.megatron_import import megatron_import
from janus.mesh import Axis, Mesh
from janus.ops.product import linear
from janus.ops.silu import silu, silu_parts
from janus.sharding.logical import EXPERT_ATTRIBUTE
from janus.tensor_parallel import ColumnParallelLinear, RowParallelLinear, megatron_group, parallel_gated_norm
from matris.config import ModelConfig, NormType

# All that blocks import of Megatron is here, inside of one `megatron_import`.
with megatron_import():
    from megatron.core.dist_checkpointing.mapping import ShardedTensor as ShardedTensor
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer.module import MegatronModule as MegatronModule
    from megatron.core.transformer.utils import (
        ensure_metadata_has_dp_cp_group,
        make_sharded_tensors_for_checkpoint,
        sharded_state_dict_default,
    )


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """How the ranks of an expert axis share the experts.

    Attributes:
        placement: `fixed`, whole experts on home ranks, or `sharded`, each expert in pieces on all ranks and gathered
            where a plan wants it.
        fp16_wire: send tokens in fp16 (`janus.expert_parallel.wire`).
    """

    placement: str = "sharded"
    fp16_wire: bool = False


@dataclass
class MatRISConfig(ModelParallelConfig):
    """Megatron's configuration of a module, with MatRIS's hyper-parameters.

    Not frozen, and with two fields that MatRIS never sets, because Megatron's classes ask for that.

    Attributes:
        model: hyper-parameters.
        mesh: the ranks that share the model; layers take the tensor and the expert axis, the model itself the graph
            axis.
        experts: how an expert axis is used.
        matmul_dtype: number format of matrix products, None for that of the parameters.
        fp8, fp4: always None; `MegatronModule` reads them.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: Mesh = field(default_factory=Mesh)
    experts: ExpertOptions = ExpertOptions()
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


def column_parallel(
    config: MatRISConfig,
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    stride: int = 1,
    bound: float | None = None,
) -> ColumnParallelLinear:
    """A layer whose outputs are split over the tensor axis; its input must have passed through `copy`."""
    return ColumnParallelLinear(
        config,
        in_features,
        out_features,
        tensor=config.mesh.tensor,
        bias=bias,
        stride=stride,
        bound=bound,
        matmul_dtype=config.matmul_dtype,
        disable_grad_reduce=True,
    )


def row_parallel(
    config: MatRISConfig, in_features: int, out_features: int, *, bias: bool, scatter_output: bool
) -> RowParallelLinear:
    """A layer whose inputs are split over the tensor axis, and whose outputs are too with `scatter_output`."""
    return RowParallelLinear(
        config,
        in_features,
        out_features,
        tensor=config.mesh.tensor,
        bias=bias,
        matmul_dtype=config.matmul_dtype,
        scatter_output=scatter_output,
    )


class FeedForward(MegatronModule):
    """W2 SiLU(W1 x), the hidden channels split over the tensor axis.

    Args:
        bias: whether both layers have a bias.
    """

    def __init__(self, config: MatRISConfig, width: int, *, bias: bool) -> None:
        super().__init__(config)
        self.layers = Layers(
            [
                column_parallel(config, width, width, bias=bias),
                row_parallel(config, width, width, bias=bias, scatter_output=False),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width), all channels and used by each tensor rank apart, to (N, width), replicated."""
        return self.layers[1](silu(self.layers[0](x)))


class MLP(MegatronModule):
    """Linear layers with SiLU between them, the same on all ranks.

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


class SplitModule(MegatronModule):
    """A module with parameters of its own that are split over the tensor axis (`split_parameter`)."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        self.tensor = config.mesh.tensor
        self.tp_group = megatron_group(self.tensor)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Megatron's, which takes parameters outside of its own layers for replicated, with these as they are."""
        own = {name: value for name, value in self.named_parameters(recurse=False)}
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        split = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: value.partition_dim for name, value in own.items()},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | split


class GatedMLP(SplitModule):
    """SiLU(norm(core(x))) * sigmoid(norm(gate(x))) of a concatenation x of features that is never formed.

    A linear layer of concatenated features is the sum of linear layers of the parts, so a part that belongs to nodes is
    multiplied once per node and gathered afterwards, and core and gate share each product: the output of each inner
    layer is the core's half, then the gate's.

    Over W tensor ranks each has width / W channels of both halves, of the hidden layer and of the output alike. Inputs
    hold all channels and must have passed through `copy`.

    Args:
        num_parts: how many features of width `hidden_size` are concatenated.
        hidden_size: of each half's hidden layer; by default that of the features.
    """

    def __init__(self, config: MatRISConfig, num_parts: int, hidden_size: int | None = None) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        norm_type = config.model.norm_type
        # torch's default for the one layer that these are together.
        bound = (num_parts * width) ** -0.5
        hidden = width if hidden_size is None else hidden_size
        self.inner = Layers(
            column_parallel(config, width, 2 * hidden, bias=part == 0, stride=2, bound=bound)
            for part in range(num_parts)
        )
        self.core = row_parallel(config, hidden, width, bias=True, scatter_output=True)
        self.gate = row_parallel(config, hidden, width, bias=True, scatter_output=True)
        self.width, self.hidden = width // self.tensor.size, hidden // self.tensor.size
        self.center = norm_type is NormType.layer
        self.eps = norm_eps(norm_type, config.params_dtype)
        self.norm_weight = split_parameter(torch.ones(2, width), self.tensor, dim=1)
        self.norm_bias = split_parameter(torch.zeros(2, width), self.tensor, dim=1) if self.center else None

    def project(self, part: int, x: Tensor) -> Tensor:
        """What part number `part` adds to the inner layer: (N, width) to (N, 2 hidden / W). Part 0 brings the bias."""
        return self.inner[part](x)

    def finish(self, inner: Tensor, routed: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """From the summed projections (N, 2 hidden / W) to the output (N, width / W).

        Args:
            routed: what routed experts add to core and gate before the norm, (N, width) each, partial over the ranks.
        """
        core, gate = silu_parts(inner, 2)
        to_core, to_gate = (None, None) if routed is None else routed
        return parallel_gated_norm(
            self.core(core, to_core),
            self.gate(gate, to_gate),
            self.norm_weight,
            self.norm_bias,
            eps=self.eps,
            center=self.center,
            tensor=self.tensor,
        )


class Layers(nn.ModuleList):
    """A list of modules that Megatron's sharded state dict looks into; it takes torch's for replicated tensors."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Of all modules of the list."""
        found: dict[str, Any] = {}
        for index, module in enumerate(self):
            found |= sharded_state_dict_default(module, f"{prefix}{index}.", sharded_offsets, metadata)
        return found


def split_parameter(whole: Tensor, tensor: Axis, *, dim: int, home: Axis | None = None) -> nn.Parameter:
    """The piece along `dim` of a parameter that is split over the tensor axis.

    Args:
        home: the expert axis, if the first dimension is split over it.
    """
    if home is not None:
        whole = whole.chunk(home.size)[home.rank]
    parameter = nn.Parameter(whole.chunk(tensor.size, dim=dim)[tensor.rank].clone())
    set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    setattr(parameter, EXPERT_ATTRIBUTE, home is not None)
    return parameter


def norm_eps(norm_type: NormType, dtype: torch.dtype) -> float:
    """What the two norms add to the variance: torch's defaults, which released weights were trained with."""
    return 1e-5 if norm_type is NormType.layer else torch.finfo(dtype).eps
