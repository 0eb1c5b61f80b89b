"""Our models as checkpoints of the reference package (PyPI `matris`), as far as it can represent them."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matris.config import AngularBasis, ModelConfig, RadialBasis
from matris.exported import StoredModel
from matris.reference import reference_names

_NUM_ELEMENTS = 94
_MAX_DEGREE = 4
_ROW = re.compile(r"reference_energy\.fc\.weight|_res_weight$")
"""Vectors that the package keeps as a single row."""
_LAST_OF_ENERGY = re.compile(r"energy_head\.energy_head\.layers\.(\d+)\.(weight|bias)")


def save_reference(stored: StoredModel, path: Path) -> None:
    """Writes a `.pth.tar` that `MatRIS.from_dict` of the reference package takes.

    Raises:
        ValueError: the model has something that the package has not; says what.
        FileExistsError: `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another output, or remove it first")
    config, state = reference_content(stored)
    content = io.BytesIO()  # torch says less than Python about why a file cannot be written; these models are small
    torch.save({"config": config, "state_dict": state}, content)
    path.write_bytes(content.getbuffer())


def reference_content(stored: StoredModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor settings and state dict of the reference package.

    An energy scale, which the package has not, is multiplied into the last layer of the energy head.

    Raises:
        ValueError: as `save_reference`.
    """
    hyper = stored.model.hyper
    _refuse(hyper)
    references, scale = stored.read("reference_energies"), stored.read("energy_scale")
    has_reference = bool(references.any())
    state: dict[str, Tensor] = {}
    for theirs, ours in _grouped(hyper, has_reference=has_reference).items():
        value = torch.cat([stored.read(name) for name in ours], dim=1) if len(ours) > 1 else stored.read(ours[0])
        if ours == ["reference_energies"]:
            value = _as_single_if_exact(value)
        if _ROW.search(theirs[0]):
            value = value[None]
        for name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            # What is one row of ours for core and for gate is a vector of theirs.
            state[name] = (part[0] if len(theirs) > 1 and "norm" in name else part).clone()
    if scale != 1.0:
        last = max(int(found[1]) for name in state if (found := _LAST_OF_ENERGY.fullmatch(name)))
        for kind in ("weight", "bias"):
            name = f"energy_head.energy_head.layers.{last}.{kind}"
            state[name] = (scale * state[name].double()).to(state[name].dtype)
    return _config(hyper, has_reference=has_reference), state | _constants(hyper)


def _refuse(hyper: ModelConfig) -> None:
    """What has no counterpart."""
    reasons = {
        "it has experts (model.num_moe_experts)": hyper.num_moe_experts > 0,
        "its attention is smooth (model.smooth_attention), which gives other numbers than the package's": (
            hyper.smooth_attention
        ),
        f"it has learned several levels of theory ({', '.join(hyper.tasks)})": bool(hyper.tasks),
        f"it has weights for {hyper.num_elements} elements, and the package for {_NUM_ELEMENTS}": (
            hyper.num_elements != _NUM_ELEMENTS
        ),
        f"model.num_angular ({hyper.num_angular}) is not model.num_radial ({hyper.num_radial})": (
            hyper.angular_basis is AngularBasis.fourier and hyper.num_angular != hyper.num_radial
        ),
        f"model.spherical_degree is {hyper.spherical_degree}, above {_MAX_DEGREE}": (
            hyper.angular_basis is AngularBasis.spherical and hyper.spherical_degree > _MAX_DEGREE
        ),
        "its energy head has no hidden layer": not hyper.readout_hidden_sizes,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(f"the reference package cannot represent this model: {'; '.join(found)}")


def _grouped(hyper: ModelConfig, *, has_reference: bool) -> dict[tuple[str, ...], list[str]]:
    """The reference's weights that one of ours, or several beside each other, are split into."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for ours, theirs in reference_names(hyper, has_reference=has_reference):
        groups.setdefault(theirs, []).append(ours)
    return groups


def _as_single_if_exact(values: Tensor) -> Tensor:
    """Single precision, which is what the package computes these with, unless digits would be lost here."""
    single = values.float()
    return single if torch.equal(single.double(), values.double()) else values


def _constants(hyper: ModelConfig) -> dict[str, Tensor]:
    """What the package stores and we compute."""
    found = {}
    if hyper.angular_basis is AngularBasis.spherical:
        found["three_body_embedding.expansion.factor"] = torch.tensor(math.sqrt(2.0 / hyper.pairwise_cutoff**3))
    if hyper.radial_basis is RadialBasis.gaussian:
        for name, cutoff in (("pairwise", hyper.pairwise_cutoff), ("threebody", hyper.three_body_cutoff)):
            offsets = torch.linspace(0.0, cutoff, hyper.num_radial)
            found[f"edge_embedding.{name}_rbf_expansion.offset"] = offsets
    return found


def _config(hyper: ModelConfig, *, has_reference: bool) -> dict[str, Any]:
    width = hyper.hidden_size
    return {
        "num_layers": hyper.num_layers,
        "node_feat_dim": width,
        "edge_feat_dim": width,
        "three_body_feat_dim": width,
        "mlp_hidden_dims": list(hyper.readout_hidden_sizes),
        "dropout": 0.0,
        "use_bias": hyper.ffn_bias,
        "distance_expansion": "Bessel" if hyper.radial_basis is RadialBasis.bessel else "Gaussian",
        "three_body_expansion": "fourier" if hyper.angular_basis is AngularBasis.fourier else "SH",
        "num_radial": hyper.num_radial,
        # Its line refinement takes this many columns of a radial basis, whatever the angular one.
        "num_angular": hyper.num_radial,
        "max_l": hyper.spherical_degree,
        "max_n": hyper.spherical_degree,
        "envelope_exponent": hyper.envelope_exponent,
        "graph_conv_mlp": "GateMLP",
        "activation_type": "silu",
        "norm_type": hyper.norm_type.value,
        "pairwise_cutoff": hyper.pairwise_cutoff,
        "three_body_cutoff": hyper.three_body_cutoff,
        "use_smoothed_for_delta_edge": hyper.enveloped_edge_update,
        "learnable_basis": hyper.learnable_basis,
        "is_intensive": True,
        "is_conservation": True,
        # Only a name that the package knows makes it have reference energies; their values are those of the state.
        "reference_energy": "MPtrj" if has_reference else None,
    }
