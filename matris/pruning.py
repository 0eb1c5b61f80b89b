"""A model with experts without those that given elements do not use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from matris.blocks.moe import state_of_elements
from matris.elements import SYMBOLS
from matris.exported import num_parameters
from matris.model import MatRIS


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
    state = model.state_dict()
    state, num_experts = state_of_elements(
        state, state.__getitem__, lambda name, experts: state[name][experts], hyper.moe_router_topk, wanted
    )
    pruned = MatRIS(replace(hyper, num_moe_experts=num_experts), precision=model.precision)
    pruned.load_state_dict(state)
    pruned.elements, pruned.predicts_magmoms = tuple(wanted), model.predicts_magmoms
    pruned.elements_of_task = {
        task: tuple(number for number in wanted if number in known) for task, known in model.elements_of_task.items()
    }
    return pruned


def pruning_line(model: MatRIS, pruned: MatRIS) -> str:
    """What was left out, for the user."""
    sizes = [num_parameters(each) for each in (model, pruned)]
    return (
        f"{pruned.hyper.num_moe_experts} of {model.hyper.num_moe_experts} experts at each site and {sizes[1]} of "
        f"{sizes[0]} parameters, for {', '.join(SYMBOLS[number] for number in pruned.elements)}"
    )
