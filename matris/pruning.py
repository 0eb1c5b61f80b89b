"""A model with experts without those that given elements do not use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from matris.blocks.moe import reader_of_elements
from matris.elements import SYMBOLS
from matris.exported import StoredModel, num_parameters, without_weights
from matris.model import MatRIS


def keep_elements(model: MatRIS, elements: Iterable[int]) -> MatRIS:
    """As `pruned`, of a model in memory."""
    state = model.state_dict()
    return pruned(StoredModel(model=model, like=state, read=state.__getitem__, provenance={}), elements).build()


def pruned(stored: StoredModel, elements: Iterable[int]) -> StoredModel:
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
    model, hyper = stored.model, stored.model.hyper
    model.check_elements(wanted)
    if not hyper.num_moe_experts:
        raise ValueError(
            "the model has no experts, so there is nothing to leave out for other elements: use it as it is"
        )
    read, num_experts = reader_of_elements(
        stored.like, stored.read, lambda name, experts: stored.read(name)[experts], hyper.moe_router_topk, wanted
    )
    shell = without_weights(
        replace(hyper, num_moe_experts=num_experts),
        model.precision,
        elements=wanted,
        elements_of_task={
            task: [number for number in wanted if number in known] for task, known in model.elements_of_task.items()
        },
        predicts_magmoms=model.predicts_magmoms,
    )
    provenance = {**stored.provenance, "experts_kept_for": [SYMBOLS[number] for number in wanted]}
    return StoredModel(model=shell, like=shell.state_dict(), read=read, provenance=provenance)


def pruning_line(model: MatRIS, pruned: MatRIS) -> str:
    """What was left out, for the user."""
    sizes = [num_parameters(each) for each in (model, pruned)]
    return (
        f"{pruned.hyper.num_moe_experts} of {model.hyper.num_moe_experts} experts at each site and {sizes[1]} of "
        f"{sizes[0]} parameters, for {', '.join(SYMBOLS[number] for number in pruned.elements)}"
    )
