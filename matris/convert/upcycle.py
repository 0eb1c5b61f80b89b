"""From a dense model to one with experts that gives the same results, to be trained on.

The experts sit around the separable attention that the dense model has: their multi-head attention takes its weights
from other features, so no choice of its parameters gives the dense one's. The shared gated perceptron of each site is
the dense layer. Each routed expert begins with the hidden layer of the dense one, and with an output of zero, which
is exact; it cannot begin with the dense output, for experts have no biases. Routing tables are random, as in a new
model, so the experts of different elements differ from the first update on.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from matris.config import ModelConfig
from matris.exported import StoredModel, without_weights

_SITE = re.compile(r"(blocks\.\d+\.atom_attention\.(?:message|update))(_experts)?\.(.+)")
_NUM_PARTS = 3
_NOISE = 0.1
_Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How many experts.

    Attributes:
        num_experts: at each site.
        topk: of them serve an element.
        hidden_size: of an expert and of the shared perceptron; None for the width of the features, at least that.
        seed: of all that is random.
    """

    num_experts: int
    topk: int
    hidden_size: int | None = None
    seed: int = 0


def upcycled(stored: StoredModel, options: Upcycling) -> StoredModel:
    """The model with experts.

    Raises:
        ValueError: it has experts already, or the numbers do not make a model.
    """
    hyper = stored.model.hyper
    if hyper.num_moe_experts:
        raise ValueError(f"the model has {hyper.num_moe_experts} experts at each site already: give one without")
    hidden = hyper.hidden_size if options.hidden_size is None else options.hidden_size
    if hidden < hyper.hidden_size:
        raise ValueError(
            f"the hidden width of an expert is {hidden}: the shared perceptron has the same, and must hold the dense "
            f"layer, so it must be at least {hyper.hidden_size}"
        )
    target = replace(
        hyper,
        num_moe_experts=options.num_experts,
        moe_router_topk=options.topk,
        moe_ffn_hidden_size=hidden,
        separable_attention=True,
    )
    dense = stored.model
    shell = without_weights(
        target,
        dense.precision,
        elements=dense.elements,
        elements_of_task=dense.elements_of_task,
        predicts_magmoms=dense.predicts_magmoms,
    )
    like = shell.state_dict()
    return StoredModel(
        model=shell,
        like=like,
        read=lambda name: _weight(name, like[name], stored.read, target, options.seed),
        provenance={**stored.provenance, "upcycled": {"experts": options.num_experts, "topk": options.topk}},
    )


def _weight(name: str, like: Tensor, read: _Read, hyper: ModelConfig, seed: int) -> Tensor:
    found = _SITE.fullmatch(name)
    if found is None:
        return read(name)
    site, of_experts, part = found.groups()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if of_experts is None:
        return _widened(part, read(name), like, hyper, generator)
    if part == "router.table":
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)
    if part in ("core", "gate"):
        return torch.zeros(like.shape, dtype=like.dtype)
    parts = [read(f"{site}.inner.{index}.weight") for index in range(_NUM_PARTS)]
    width = hyper.hidden_size
    dense = torch.cat(parts, dim=1).view(2, width, _NUM_PARTS * width)
    value = _uniform(like, dense.shape[-1], generator)
    # A little of the random values, or experts that serve the same elements would stay alike for ever.
    value[:, :, :width] = dense + _NOISE * value[:, :, :width]
    return value


def _widened(part: str, dense: Tensor, like: Tensor, hyper: ModelConfig, generator: torch.Generator) -> Tensor:
    """A weight of the shared perceptron. Hidden channels that the dense layer has not are new, with an output of
    zero."""
    if dense.shape == like.shape:
        return dense
    width, hidden = hyper.hidden_size, hyper.moe_ffn_hidden_size
    if not part.startswith("inner."):  # core and gate, (width, hidden)
        value = torch.zeros(like.shape, dtype=like.dtype)
        value[:, :width] = dense
        return value
    value = _uniform(like, _NUM_PARTS * width, generator)
    value.view(2, hidden, *like.shape[1:])[:, :width] = dense.view(2, width, *like.shape[1:])
    return value


def _uniform(like: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """As the layers of a new model begin."""
    return torch.empty(like.shape, dtype=like.dtype).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
