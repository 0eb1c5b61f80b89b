"""The reference package's checkpoints (PyPI `matris`) and our models: the same numbers under other names."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from matris.config import AngularBasis, ModelConfig, NormType, Precision, RadialBasis
from matris.exported import StoredModel, write_model
from matris.model import MatRIS
from matris.tensor_files import sha256_of

_Choice = TypeVar("_Choice")

_FIXED = {
    "dropout": (0.0, 0),
    "graph_conv_mlp": ("GateMLP", "gatemlp", "GatedMLP"),
    "activation_type": ("silu", "SiLU"),
    "is_conservation": (True,),
}
"""Settings of the reference package of which only these values exist here."""

_CONSTANTS = {
    "three_body_embedding.expansion.factor",
    "edge_embedding.pairwise_rbf_expansion.offset",
    "edge_embedding.threebody_rbf_expansion.offset",
}
"""Stored by the reference package, though they follow from the cutoffs."""


def convert_reference(source: Path, output: Path) -> None:
    """Convert a checkpoint of the reference package into a model directory.

    Args:
        source: a `.pth.tar` of `matris` 0.1.0 or 1.0.0. Read with `weights_only=True`: code in it is never run.
        output: directory to create.

    Raises:
        ValueError: not such a checkpoint, a setting that has no counterpart, unknown or missing weights (by name).
        FileExistsError: `output` exists.
    """
    write_model(open_reference(source), output)


def open_reference(source: Path) -> StoredModel:
    """A checkpoint of the reference package as a model of ours, in memory.

    Raises:
        ValueError: as `convert_reference`.
    """
    model = model_from_reference(*read_reference(source), origin=str(source))
    state = model.state_dict()
    provenance = {
        "converted_from": "reference package matris",
        "source_file": source.name,
        "source_sha256": sha256_of(source),
    }
    return StoredModel(model=model, like=state, read=state.__getitem__, provenance=provenance)


def read_reference(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor settings and state dict of a reference checkpoint."""
    if not source.is_file():
        raise ValueError(f"{source} is not a file: expected a checkpoint of the reference package (.pth.tar)")
    try:
        with warnings.catch_warnings():
            # Remarks on old formats, which nobody here can change; what torch cannot read is an error below.
            warnings.simplefilter("ignore")
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's message is not repeated: it advises to load the file with `weights_only=False`.
        if "Unsupported operand" in str(error):
            raise ValueError(
                f"{source} is not a readable torch checkpoint (UnpicklingError: it is not a pickle, or damaged)"
            ) from error
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{source} is refused: it holds more than tensors and plain values, and loading it could run code "
            f"({culprit[1] if culprit else type(error).__name__})"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{source} is not a readable torch checkpoint ({type(error).__name__}: {error})") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not {"config", "state_dict"} <= set(content):
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{source} has no 'config' and 'state_dict' (found {keys}): not a reference checkpoint")
    _check_content(content["config"], content["state_dict"], origin=str(source))
    return content["config"], content["state_dict"]


def _check_content(config: Any, state: Any, *, origin: str) -> None:
    for name, value in (("config", config), ("state_dict", state)):
        if not isinstance(value, dict):
            raise ValueError(f"{origin}: {name} is of type {type(value).__name__}: it must be a dict")
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{origin}: {name} has the key {key!r}: every key must be a string")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
            found = f"{value.layout} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{origin}: weight {name} is a {found}: it must be a dense tensor of floating point numbers"
            )
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(f"{origin}: weight {name} has {bad} of {value.numel()} values that are NaN or infinite")


def model_from_reference(config: dict[str, Any], state: dict[str, Tensor], *, origin: str) -> MatRIS:
    """Build our model from the reference's settings and weights, in the precision of the weights."""
    hyper = config_from_reference(config, origin=origin)
    state = {name.replace("composition_model.", "reference_energy."): value for name, value in state.items()}
    dtype = state["atom_embedding.embedding.weight"].dtype if "atom_embedding.embedding.weight" in state else None
    model = MatRIS(hyper, precision=Precision.fp64 if dtype == torch.float64 else Precision.fp32)
    ours = model.state_dict()
    used: set[str] = set()
    missing: list[str] = []
    converted: dict[str, Tensor] = {}
    for name, parts in reference_names(hyper, has_reference="reference_energy.fc.weight" in state):
        absent = [part for part in parts if part not in state]
        used.update(parts)
        missing += [part for part in absent if part not in missing]
        if absent:
            continue
        value = _join([state[part] for part in parts], name, hyper, ours[name].shape)
        if value is None:
            shapes = {part: tuple(state[part].shape) for part in parts}
            raise ValueError(f"{origin}: weights {shapes} do not fit {name} of shape {tuple(ours[name].shape)}")
        converted[name] = value.to(ours[name].dtype)
    unknown = sorted(set(state) - used - _CONSTANTS)
    if missing or unknown:
        raise ValueError(f"{origin}: weights do not fit its config: missing {sorted(missing)}, unknown {unknown}")
    for name in ("reference_energies", "energy_scale"):
        converted.setdefault(name, ours[name])
    model.load_state_dict(converted)
    return model


def config_from_reference(config: dict[str, Any], *, origin: str) -> ModelConfig:
    """Our hyper-parameters from the reference's constructor settings."""
    settings = dict(config)

    def take(name: str, *kinds: type) -> Any:
        if name not in settings:
            raise ValueError(f"{origin}: its config lacks {name}")
        value = settings.pop(name)
        if type(value) not in kinds:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{origin}: {name} is {value!r}: it must be of type {allowed}")
        return value

    def choose(name: str, choices: Mapping[str, _Choice]) -> _Choice:
        value = take(name, str)
        if value.lower() not in choices:
            raise ValueError(f"{origin}: {name} is {value!r}: allowed are {', '.join(choices)}")
        return choices[value.lower()]

    for name, allowed in _FIXED.items():
        value = settings.pop(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{origin}: {name} is {value!r}; only {allowed[0]!r} can be represented here")
    # Total energies are the same for both; the reference's fit is per atom or per cell accordingly.
    settings.pop("is_intensive", None)
    settings.pop("reference_energy", None)
    width = take("node_feat_dim", int)
    widths = {width, take("edge_feat_dim", int), take("three_body_feat_dim", int)}
    if len(widths) != 1:
        raise ValueError(f"{origin}: node, edge and three-body widths {sorted(widths)} differ; they must be equal")
    hidden = take("mlp_hidden_dims", int, list, tuple)
    degrees = {take("max_l", int), take("max_n", int)}
    if len(degrees) != 1:
        raise ValueError(f"{origin}: max_l and max_n are {sorted(degrees)}; they must be equal")
    exponent = take("envelope_exponent", int, float)
    if exponent != int(exponent):
        raise ValueError(f"{origin}: envelope_exponent is {exponent}: it must be a whole number")
    values: dict[str, Any] = {
        "num_layers": take("num_layers", int),
        "hidden_size": width,
        "pairwise_cutoff": float(take("pairwise_cutoff", int, float)),
        "three_body_cutoff": float(take("three_body_cutoff", int, float)),
        "num_radial": take("num_radial", int),
        "num_angular": take("num_angular", int),
        "radial_basis": choose("distance_expansion", {kind.value: kind for kind in RadialBasis}),
        "angular_basis": choose(
            "three_body_expansion", {"fourier": AngularBasis.fourier, "sh": AngularBasis.spherical}
        ),
        "spherical_degree": degrees.pop(),
        "learnable_basis": take("learnable_basis", bool),
        "envelope_exponent": int(exponent),
        "norm_type": choose("norm_type", {kind.value: kind for kind in NormType}),
        "ffn_bias": take("use_bias", bool),
        "enveloped_edge_update": take("use_smoothed_for_delta_edge", bool),
        "readout_hidden_sizes": (hidden,) if isinstance(hidden, int) else tuple(hidden),
        "smooth_attention": False,
    }
    if settings:
        raise ValueError(f"{origin}: its config has unknown settings {sorted(settings)}")
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def reference_names(config: ModelConfig, *, has_reference: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of our weights and the reference's weights that it is stacked from, in order."""
    if has_reference:
        yield "reference_energies", ("reference_energy.fc.weight",)
    yield "atom_embedding.table", ("atom_embedding.embedding.weight",)
    yield "atom_embedding.linear.weight", ("atom_embedding.atom_swish_layer.linear.weight",)
    if config.radial_basis is RadialBasis.bessel:
        yield "pair_basis.frequencies", ("edge_embedding.pairwise_rbf_expansion.frequencies",)
        yield "line_basis.frequencies", ("edge_embedding.threebody_rbf_expansion.frequencies",)
    yield "edge_embedding.linear_1.weight", ("edge_embedding.edge_linear1.weight",)
    yield "edge_embedding.linear_2.weight", ("edge_embedding.edge_linear2.weight",)
    yield "edge_embedding.linear_3.weight", ("edge_embedding.swish_layer.linear.weight",)
    for kind in ("weight", "bias"):
        yield f"edge_embedding.norm.{kind}", (f"edge_embedding.edge_init_norm.{kind}",)
    if config.angular_basis is AngularBasis.fourier:
        yield "angle_embedding.basis.frequencies", ("three_body_embedding.expansion.frequencies",)
    yield "angle_embedding.linear_1.weight", ("three_body_embedding.angle_embedding.weight",)
    yield "angle_embedding.linear_2.weight", ("three_body_embedding.swish_layer.linear.weight",)
    for index in range(config.num_layers):
        for ours, theirs in (("line", "line_graph"), ("atom", "atom_graph")):
            block, reference = f"blocks.{index}.{ours}", f"interaction_block.{index}"
            attention = f"{reference}.attn_block_{theirs}"
            yield from _gated_names(config, f"{block}_attention.message", f"{attention}.edge_nonlinear_update")
            yield from _gated_names(config, f"{block}_attention.update", f"{attention}.node_nonlinear_update")
            yield (
                f"{block}_attention.logits.weight",
                (f"{attention}.target_weight_linear.weight", f"{attention}.source_weight_linear.weight"),
            )
            refinement = f"{reference}.refine_block_{theirs}"
            yield from _gated_names(config, f"{block}_refinement.message", f"{refinement}.edge_nonlinear_update")
            for kind in ("weight", "bias") if config.ffn_bias else ("weight",):
                for layer, position in enumerate((0, 3)):
                    for ffn in ("node", "edge"):
                        yield (
                            f"{block}_refinement.{ffn}_ffn.layers.{layer}.{kind}",
                            (f"{refinement}.{ffn}_FFN.layers.{position}.{kind}",),
                        )
            yield f"{block}_refinement.envelope.weight", (f"{refinement}.learnable_envelope.weight",)
            for part, name in ((f"{block}_attention", attention), (f"{block}_refinement", refinement)):
                yield f"{part}.node_residual", (f"{name}.node_res_weight",)
                yield f"{part}.edge_residual", (f"{name}.edge_res_weight",)
    norm_kinds = ("weight", "bias") if config.norm_type is NormType.layer else ("weight",)
    for kind in norm_kinds:
        yield f"readout.norm.{kind}", (f"readout_norm.{kind}",)
    for head, depth in (("energy", len(config.readout_hidden_sizes) + 1), ("magmom", 2)):
        for layer in range(depth):
            for kind in ("weight", "bias"):
                yield f"readout.{head}.layers.{layer}.{kind}", (f"{head}_head.{head}_head.layers.{3 * layer}.{kind}",)


def _gated_names(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    halves = ("core", "gate")
    for part in range(_num_parts(ours)):
        yield f"{ours}.inner.{part}.weight", tuple(f"{theirs}.mlp_{half}.layers.0.weight" for half in halves)
    yield f"{ours}.inner.0.bias", tuple(f"{theirs}.mlp_{half}.layers.0.bias" for half in halves)
    for kind in ("weight", "bias"):
        for half in halves:
            yield f"{ours}.{half}.{kind}", (f"{theirs}.mlp_{half}.layers.3.{kind}",)
    for kind in ("weight", "bias") if config.norm_type is NormType.layer else ("weight",):
        yield f"{ours}.norm_{kind}", tuple(f"{theirs}.{half}_norm.{kind}" for half in halves)


def _num_parts(gated: str) -> int:
    """Features that a gated MLP takes, from its name: two nodes and their edge, and in a line graph the atom as well
    where messages are refined."""
    return 4 if gated.endswith("line_refinement.message") else 3


def _join(parts: list[Tensor], name: str, config: ModelConfig, shape: torch.Size) -> Tensor | None:
    """The parts stacked along the first axis, in our shape; None if they do not fit."""
    if len(shape) == 2 and parts[0].dim() == 1:
        parts = [part[None] for part in parts]
    if any(part.dim() == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return None
    value = torch.cat(parts)
    if len(shape) == 1 and value.dim() == 2 and value.shape[0] == 1:
        value = value[0]
    inner = re.fullmatch(r"(.*)\.inner\.(\d)\.weight", name)
    if inner:
        # The reference multiplies concatenated features: each of our layers is a block of its columns.
        num_parts = _num_parts(inner[1])
        if value.dim() != 2 or value.shape[1] != num_parts * config.hidden_size:
            return None
        value = value.chunk(num_parts, dim=1)[int(inner[2])]
    return value if value.shape == shape else None
