"""What a model is besides its weights, as JSON-ready values in formats that are not ours to design."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from matris.config import ModelConfig
from matris.elements import SYMBOLS, number_of
from matris.exported import StoredModel, precision_of, without_weights
from matris.model import MatRIS

_DTYPE_OF = "atom_embedding.table"


def export_facts(model: MatRIS) -> dict[str, Any]:
    """Entries of a training checkpoint's `export`, as `matris.task` writes them."""
    return {
        "elements": _symbols(model.elements),
        "task_elements": {task: _symbols(numbers) for task, numbers in model.elements_of_task.items()},
        "predicts_magmoms": model.predicts_magmoms,
    }


def stored_model(
    hyper: Any,
    export: Any,
    *,
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    provenance: Mapping[str, Any],
    origin: str,
) -> StoredModel:
    """A model of named weights.

    Args:
        hyper: hyper-parameters, as `ModelConfig.to_dict` gives them.
        export: as `export_facts` gives it.
        like: what there is, by the names of a model's weights.
        origin: for messages.

    Raises:
        ValueError: the facts are not of a model, or the weights do not fit them.
    """
    if not isinstance(hyper, Mapping) or not isinstance(export, Mapping):
        raise ValueError(f"{origin} does not say what its model is (hyper-parameters, elements)")
    dtype = like[_DTYPE_OF].dtype if _DTYPE_OF in like else torch.float32
    try:
        shell = without_weights(
            ModelConfig.from_dict(dict(hyper)),
            precision_of(dtype),
            elements=_numbers(export["elements"]),
            elements_of_task={task: _numbers(names) for task, names in export["task_elements"].items()},
            predicts_magmoms=bool(export["predicts_magmoms"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{origin} does not say what its model is: {error}") from error
    expected = shell.state_dict()
    wrong = [
        name
        for name in sorted({*expected, *like})
        if name not in expected or name not in like or expected[name].shape != like[name].shape
    ]
    if wrong:
        found = tuple(like[wrong[0]].shape) if wrong[0] in like else "missing"
        should = tuple(expected[wrong[0]].shape) if wrong[0] in expected else "unknown"
        raise ValueError(
            f"the weights of {origin} do not fit its hyper-parameters: {len(wrong)} differ, such as {wrong[0]} "
            f"(it is {found}, expected is {should})"
        )
    return StoredModel(
        model=shell, like=expected, read=lambda name: read(name).to(expected[name].dtype), provenance=provenance
    )


def _symbols(numbers: tuple[int, ...]) -> list[str]:
    return [SYMBOLS[number] for number in numbers]


def _numbers(symbols: Any) -> tuple[int, ...]:
    return tuple(sorted({number_of(str(symbol)) for symbol in symbols}))
