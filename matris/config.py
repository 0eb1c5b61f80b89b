"""Hyper-parameters of the model and of its loss, as frozen dataclasses. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any


class Precision(str, Enum):
    """Number formats of a run. Geometry, reductions and the loss are never below fp32."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16_mixed = "bf16-mixed"
    fp64 = "fp64"


class NormType(str, Enum):
    """Normalisation inside the gated perceptrons."""

    layer = "layer"
    rms = "rms"


class RadialBasis(str, Enum):
    """Expansion of an edge length."""

    bessel = "bessel"
    gaussian = "gaussian"


class AngularBasis(str, Enum):
    """Expansion of an angle."""

    fourier = "fourier"
    spherical = "spherical"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of MatRIS (arXiv 2603.02002).

    Attributes:
        num_layers: interaction blocks.
        hidden_size: width of node, edge and angle features.
        pairwise_cutoff: radius of the atom graph, Angstrom.
        three_body_cutoff: radius of the line graph (edges that form angles), Angstrom; at most `pairwise_cutoff`.
        num_radial: radial basis functions.
        num_angular: columns of the Fourier angular basis (odd); need not equal `num_radial`.
        radial_basis: `bessel` (enveloped) or `gaussian`.
        angular_basis: `fourier`, or `spherical` (a constant radial factor times Legendre polynomials).
        spherical_degree: number of degrees of the spherical basis; it has the square of that many columns.
        learnable_basis: whether Bessel and Fourier frequencies are trained.
        envelope_exponent: p of the polynomial envelope.
        norm_type: `layer` (released models) or `rms`.
        ffn_bias: whether the feed-forward layers of the refinement have biases.
        enveloped_edge_update: whether the refinement updates an edge by its enveloped message.
        readout_hidden_sizes: hidden widths of the energy head.
        smooth_attention: energy, forces and stress continuous at both cutoffs. False only for released weights.
        num_elements: elements that the model has weights for, Z = 1..num_elements; 94 in released models, at most 118.
        num_moe_experts: routed experts at each of the two sites of a block's atom attention; 0: no experts, and the
            separable attention in place of the multi-head attention.
        moe_router_topk: routed experts that serve an element.
        moe_ffn_hidden_size: hidden width of an expert.
        kv_channels: width of a head of the multi-head attention; must divide `hidden_size`.
        separable_attention: with experts: whether they sit around the separable attention, as in a model that was
            made of one without experts, and not around the multi-head attention.
        tasks: names of the levels of theory that one model learns together, in the order of its tables; set from
            `data.tasks`. Empty: a single one without a name, and no embedding of it.
        charge_tasks, spin_tasks: those of them whose structures must state their total charge, their spin multiplicity.
    """

    num_layers: int = 4
    hidden_size: int = 128
    pairwise_cutoff: float = 6.0
    three_body_cutoff: float = 4.5
    num_radial: int = 7
    num_angular: int = 7
    radial_basis: RadialBasis = RadialBasis.bessel
    angular_basis: AngularBasis = AngularBasis.fourier
    spherical_degree: int = 4
    learnable_basis: bool = True
    envelope_exponent: int = 8
    norm_type: NormType = NormType.layer
    ffn_bias: bool = False
    enveloped_edge_update: bool = False
    readout_hidden_sizes: tuple[int, ...] = (256, 128, 128)
    smooth_attention: bool = True
    num_elements: int = 94
    num_moe_experts: int = 0
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int = 0
    kv_channels: int = 64
    separable_attention: bool = False
    tasks: tuple[str, ...] = ()
    charge_tasks: tuple[str, ...] = ()
    spin_tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            entries = str if field.name.endswith("tasks") else int
            _check_type(f"model.{field.name}", getattr(self, field.name), type(field.default), entries)
        for name in ("num_layers", "hidden_size", "num_radial", "num_angular", "spherical_degree", "envelope_exponent"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name} is {value}: it must be at least 1")
        if any(size < 1 for size in self.readout_hidden_sizes):
            raise ValueError(f"model.readout_hidden_sizes is {self.readout_hidden_sizes}: every width must be positive")
        if not 0.0 < self.three_body_cutoff <= self.pairwise_cutoff:
            raise ValueError(
                f"model.three_body_cutoff is {self.three_body_cutoff} A: it must be positive and at most "
                f"model.pairwise_cutoff ({self.pairwise_cutoff} A), because edges of the atom graph form the angles"
            )
        if self.angular_basis is AngularBasis.fourier and self.num_angular % 2 == 0:
            raise ValueError(
                f"model.num_angular is {self.num_angular}: the Fourier basis has a constant, sines and cosines, "
                "so it must be odd"
            )

        if not 1 <= self.num_elements <= 118:
            raise ValueError(f"model.num_elements is {self.num_elements}: it must be between 1 and 118")
        self._check_experts()
        if len(set(self.tasks)) < len(self.tasks) or not all(self.tasks):
            raise ValueError(f"model.tasks is {self.tasks}: every task needs a name of its own")
        if unknown := {*self.charge_tasks, *self.spin_tasks}.difference(self.tasks):
            raise ValueError(
                f"model.charge_tasks and model.spin_tasks name {', '.join(sorted(unknown))}: model.tasks has only "
                f"{', '.join(self.tasks) or 'no task'}"
            )

    def _check_experts(self) -> None:
        names = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size")
        experts, topk, hidden = (getattr(self, name) for name in names)
        if (experts, topk, hidden) == (0, 0, 0):
            if self.separable_attention:
                raise ValueError(
                    "model.separable_attention is true without experts: a model without experts always has that "
                    "attention; leave it out"
                )
            return
        if min(experts, topk, hidden) < 1:
            raise ValueError(
                f"model.num_moe_experts, moe_router_topk and moe_ffn_hidden_size are {experts}, {topk} and {hidden}: "
                "give all three as positive numbers, or none of them for a model without experts"
            )
        if topk > experts:
            raise ValueError(
                f"model.moe_router_topk is {topk}, but there are {experts} experts (model.num_moe_experts): choose at "
                "most that many"
            )
        if self.separable_attention:
            return
        if self.kv_channels < 1 or self.hidden_size % self.kv_channels:
            raise ValueError(
                f"model.kv_channels is {self.kv_channels}: the width of a head must divide model.hidden_size "
                f"({self.hidden_size})"
            )
        if not self.smooth_attention:
            raise ValueError(
                "model.smooth_attention is false: the multi-head attention of a model with experts is smooth"
            )

    def needs(self, task: str | None) -> tuple[str, ...]:
        """What a structure must state for a task: `charge`, `spin`, both or nothing."""
        of_states = {"charge": self.charge_tasks, "spin": self.spin_tasks}
        return tuple(name for name, tasks in of_states.items() if task in tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, enums by their values; without what only some models have, where this one has not."""
        return {
            name: value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if (self.tasks or name not in TASK_FIELDS) and (self.separable_attention or name != "separable_attention")
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing names, or values out of range.
        """
        known = {field.name for field in fields(ModelConfig)}
        # Models of before experts or tasks existed have none.
        values = {name: getattr(ModelConfig, name) for name in _SINCE_EXPERTS + TASK_FIELDS} | values
        if set(values) != known:
            raise ValueError(
                f"model hyper-parameters do not fit this version: unknown {sorted(set(values) - known)}, "
                f"missing {sorted(known - set(values))}"
            )
        tuples = {
            name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in ("readout_hidden_sizes", *TASK_FIELDS)
        }
        return ModelConfig(
            **{
                **values,
                **tuples,
                "radial_basis": RadialBasis(values["radial_basis"]),
                "angular_basis": AngularBasis(values["angular_basis"]),
                "norm_type": NormType(values["norm_type"]),
            }
        )


_SINCE_EXPERTS = (
    "num_elements",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "kv_channels",
    "separable_attention",
)
TASK_FIELDS = ("tasks", "charge_tasks", "spin_tasks")
"""Hyper-parameters that follow from `data.tasks`: no options, and no settings of a run."""


def _check_type(name: str, value: Any, kind: type, entries: type = int) -> None:
    """Values from files reach the dataclass unchecked.

    Args:
        entries: type of those of a tuple.
    """
    if kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    elif kind is tuple:
        fits = isinstance(value, tuple) and all(type(entry) is entries for entry in value)
    else:
        fits = type(value) is kind
    if not fits:
        content = {int: "whole numbers", str: "names"}[entries]
        wanted = {float: "a finite number", tuple: f"a tuple of {content}", int: "a whole number"}
        raise ValueError(f"{name} is {value!r}: it must be {wanted.get(kind, kind.__name__)}")


class LossKind(str, Enum):
    """Error measure of one loss term."""

    mae = "mae"
    mse = "mse"
    huber = "huber"
    l2norm = "l2norm"


class ForceReduction(str, Enum):
    """How per-atom force errors are averaged: over atoms, or over atoms of a structure and then over structures."""

    atom = "atom"
    graph = "graph"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Force-matching loss. Defaults are the published MatRIS recipe (stress weight 0.1 per GPa).

    Attributes:
        energy_weight: weight of the energy term, per eV/atom.
        forces_weight: weight of the force term, per eV/A.
        stress_weight: weight of the stress term, per eV/A^3 (16.0 is 0.1 per GPa).
        magmoms_weight: weight of the magnetic moments, per Bohr magneton; 0 trains no magnetic moments.
        energy: error measure of the energy per atom (`mae`, `mse`, `huber`).
        forces: `l2norm` (length of an atom's error vector) or `mae`, `mse`, `huber` (mean over components).
        stress: error measure of the nine stress components.
        magmoms: error measure of the magnetic moments.
        huber_delta: where Huber turns from quadratic to linear, in the units of each term.
        force_reduction: `graph` or `atom`.
    """

    energy_weight: float = 5.0
    forces_weight: float = 5.0
    stress_weight: float = 16.0
    magmoms_weight: float = 0.0
    energy: LossKind = LossKind.mae
    forces: LossKind = LossKind.l2norm
    stress: LossKind = LossKind.mae
    magmoms: LossKind = LossKind.mae
    huber_delta: float = 0.01
    force_reduction: ForceReduction = ForceReduction.graph

    def __post_init__(self) -> None:
        weights = (self.energy_weight, self.forces_weight, self.stress_weight, self.magmoms_weight)
        if min(weights) < 0.0 or max(weights) == 0.0:
            raise ValueError(
                f"loss weights (energy, forces, stress, magmoms) are {weights}: they must not be negative, "
                "and at least one must be positive"
            )
        for name in ("energy", "stress", "magmoms"):
            if getattr(self, name) is LossKind.l2norm:
                raise ValueError(f"loss.{name} is l2norm: that is defined for forces only; use mae, mse or huber")
        if self.huber_delta <= 0.0:
            raise ValueError(f"loss.huber_delta is {self.huber_delta}: it must be positive")
