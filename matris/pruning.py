"""A model with experts without those that given elements do not use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from matris.blocks.moe import RoutedExperts
from matris.elements import SYMBOLS
from matris.model import MatRIS

_OF_EXPERTS = ("inner", "core", "gate")
"""Parameters of `RoutedExperts` whose first dimension is the expert."""


def keep_elements(model: MatRIS, elements: Iterable[int]) -> MatRIS:
    """The model for these elements alone: the same results for them, and a refusal of all others.

    Routing is by element, so the experts that serve them are known. All sites keep the same number of experts, that of
    the site where most are used; the others keep some that are not.

    Args:
        elements: atomic numbers, in any order.

    Raises:
        ValueError: no elements, such that the model does not know, or a model without experts.
    """
    wanted = sorted(set(elements))
    if not wanted:
        raise ValueError("no elements to keep: name at least one")
    model.check_elements(wanted)
    hyper = model.hyper
    if not hyper.num_moe_experts:
        raise ValueError(
            "the model has no experts, so there is nothing to leave out for other elements: use it as it is"
        )
    rows = torch.tensor(wanted) - 1
    sites = {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
    used = {name: site.router()[0][rows].unique() for name, site in sites.items()}
    num_experts = max(map(len, used.values()))
    state = model.state_dict()
    for name, experts in used.items():
        idle = torch.tensor(sorted(set(range(hyper.num_moe_experts)) - set(experts.tolist())), dtype=torch.int64)
        # In their old order, in which sums over experts are formed.
        kept = torch.cat([experts, idle[: num_experts - len(experts)]]).sort().values
        for part in _OF_EXPERTS:
            state[f"{name}.{part}"] = state[f"{name}.{part}"][kept]
        state[f"{name}.router.table"] = state[f"{name}.router.table"][:, kept]
    pruned = MatRIS(replace(hyper, num_moe_experts=num_experts), precision=model.precision)
    pruned.load_state_dict(state)
    pruned.elements, pruned.predicts_magmoms = tuple(wanted), model.predicts_magmoms
    pruned.elements_of_task = {
        task: tuple(number for number in wanted if number in known) for task, known in model.elements_of_task.items()
    }
    return pruned


def pruning_line(model: MatRIS, pruned: MatRIS) -> str:
    """What was left out, for the user."""
    sizes = [sum(value.numel() for value in each.parameters()) for each in (model, pruned)]
    return (
        f"{pruned.hyper.num_moe_experts} of {model.hyper.num_moe_experts} experts at each site and {sizes[1]} of "
        f"{sizes[0]} parameters, for {', '.join(SYMBOLS[number] for number in pruned.elements)}"
    )
