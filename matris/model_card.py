"""The model card, `README.md` of a model directory: what a `config.json` says, for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown.

    Args:
        config: content of a `config.json`.
    """
    provenance = config["provenance"]
    parts = [
        "# MatRIS interatomic potential",
        _what(config),
        "## Use",
        _USE,
        "## Units",
        "".join(f"- {name}: {unit}\n" for name, unit in config["units"].items())
        + "\nStress is positive when tensile. Energies are total energies: reference energies of the atoms are added.",
        "## Elements",
        _elements(config),
        "## Data and errors",
        _data(provenance),
        "## Provenance and settings",
        "```json\n" + json.dumps(provenance, indent=1) + "\n```",
        "## Hyper-parameters",
        "```json\n" + json.dumps(config["model"], indent=1) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```python
from ase.build import bulk
from matris.calculator import MatRISCalculator

atoms = bulk("Si")  # of elements that are listed below
atoms.calc = MatRISCalculator("this directory")  # with tasks also task="..."
energy, forces = atoms.get_potential_energy(), atoms.get_forces()
```

`janus-matris info --model DIR` describes it, `relax` and `md` simulate, `eval` measures errors, and
`train --init_from DIR` fine-tunes. The weights are safetensors; `config.json` holds the SHA-256 of each file."""


def _what(config: Mapping[str, Any]) -> str:
    hyper = config["model"]
    experts = hyper.get("num_moe_experts", 0)
    kind = f"{experts} experts at each site, {hyper['moe_router_topk']} of them for an element" if experts else "dense"
    magmoms = ", magnetic moments" if config["predicts_magmoms"] else ""
    return (
        f"Energies, forces, stress{magmoms} of atomic structures (MatRIS, arXiv 2603.02002). {config['parameters']} "
        f"parameters in {config['parameter_dtype']}, {kind}; {hyper['num_layers']} layers of width "
        f"{hyper['hidden_size']}, cutoffs {hyper['pairwise_cutoff']} A (pairs) and {hyper['three_body_cutoff']} A "
        f"(angles); {'continuous' if hyper['smooth_attention'] else 'not continuous'} at the cutoffs."
    )


def _elements(config: Mapping[str, Any]) -> str:
    of_task = config.get("task_elements")
    if not of_task:
        return ", ".join(config["elements"]) + ". Others are refused."
    return "\n".join(f"- task `{task}`: {', '.join(symbols)}" for task, symbols in of_task.items())


def _data(provenance: Mapping[str, Any]) -> str:
    settings = provenance.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    named = {key: value for key, value in data.items() if value not in (None, [], "")} if data else {}
    lines = [f"- {key}: `{json.dumps(named[key])}`" for key in ("train", "valid", "test", "tasks") if key in named]
    report = provenance.get("validation")
    if isinstance(report, Mapping):
        lines += [
            f"- validation, {name.replace('_', ' ')}: {value:.4g}"
            for name, value in report.items()
            if ("_mae_" in name or "_rmse_" in name) and isinstance(value, int | float) and math.isfinite(value)
        ]
    return "\n".join(lines) or "Not known to this file."
