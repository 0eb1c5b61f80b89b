"""What a machine can do, from a YAML file: rates, memory and links of its devices, with where each figure is from.

Imports nothing heavy. The files in `janus/machines` are found by name; any other is given by its path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "machines"
FORMATS = ("fp32", "tf32", "bf16")
"""Of the operands of matrix products."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A figure that is known between two bounds.

    Attributes:
        low, high: pessimistic and optimistic.
    """

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """How one device reaches others.

    Attributes:
        GB_per_s: 1e9 bytes per second that it sends, while it receives as many.
        latency_us: microseconds that one message takes beside its bytes.
    """

    GB_per_s: float
    latency_us: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What of the peak figures programs reach; the reason why predictions are bands.

    Attributes:
        matrix: of the rate of matrix products.
        memory: of the memory bandwidth.
        links: of the bandwidth of links.
        overlap: of the communication that is meant to be hidden behind computation, how much is.
    """

    matrix: Band
    memory: Band
    links: Band
    overlap: Band


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A cluster of equal nodes.

    Attributes:
        name: for people.
        sources: where the figures are from, for people.
        devices_per_node: ranks that a node has room for.
        memory_GB: 1e9 bytes of memory of a device.
        tflops: 1e12 FLOP/s of dense matrix products, by format of the operands; a format may be missing.
        memory_GB_per_s: bandwidth of a device's memory, 1e9 bytes per second.
        in_node: to devices of the same node.
        between_nodes: to those of other nodes, for each device.
        shares: what of it is reached.
    """

    name: str
    sources: tuple[str, ...]
    devices_per_node: int
    memory_GB: float
    tflops: Mapping[str, float]
    memory_GB_per_s: float
    in_node: Link
    between_nodes: Link
    shares: Shares

    def flops_per_s(self, products: str) -> float:
        """At best.

        Raises:
            ValueError: the machine has no such matrix products.
        """
        if products not in self.tflops:
            raise ValueError(
                f"machine {self.name} has no rate of {products} products: choose a precision that it has "
                f"({', '.join(self.tflops)}), or add tflops.{products} to its description"
            )
        return 1e12 * self.tflops[products]


def machine_names() -> tuple[str, ...]:
    """Those that come along."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_machine(name: str) -> Machine:
    """A machine by its name, or from a YAML file with the fields of `Machine`.

    Raises:
        ValueError: no such name, or what is wrong in the file.
        OSError: the file cannot be read.
    """
    if name in machine_names():
        path = FOLDER / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        raise ValueError(
            f"machine {name!r} is not known: choose one of {', '.join(machine_names())}, or give the path of a .yaml "
            "file (copy one of those and change it)"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    return machine_of(values, str(path))


def machine_of(values: Any, where: str) -> Machine:
    """From plain values.

    Args:
        where: they are from, for messages.

    Raises:
        ValueError: what is wrong with them.
    """
    values = _fields(values, Machine, where)
    for name in ("name", "sources"):
        texts = values[name] if name == "sources" and isinstance(values[name], list) else [values[name]]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: {name} is {values[name]!r}: it must be text that is not empty")
        values[name] = tuple(texts) if name == "sources" else texts[0]
    if type(values["devices_per_node"]) is not int or values["devices_per_node"] < 1:
        raise ValueError(
            f"{where}: devices_per_node is {values['devices_per_node']!r}: it must be a whole number of at least 1"
        )
    for name in ("memory_GB", "memory_GB_per_s"):
        values[name] = _number(values[name], f"{where}: {name}")
    rates = values["tflops"]
    if not isinstance(rates, dict) or not rates or not set(rates) <= set(FORMATS):
        raise ValueError(f"{where}: tflops is {rates!r}: it must map some of {', '.join(FORMATS)} to TFLOP/s")
    values["tflops"] = MappingProxyType(
        {name: _number(rate, f"{where}: tflops.{name}") for name, rate in rates.items()}
    )
    for name in ("in_node", "between_nodes"):
        link = _fields(values[name], Link, f"{where}: {name}")
        values[name] = Link(
            GB_per_s=_number(link["GB_per_s"], f"{where}: {name}.GB_per_s"),
            latency_us=_number(link["latency_us"], f"{where}: {name}.latency_us", smallest=0.0),
        )
    shares = _fields(values["shares"], Shares, f"{where}: shares")
    values["shares"] = Shares(**{name: _band(band, f"{where}: shares.{name}") for name, band in shares.items()})
    return Machine(**values)


def _fields(values: Any, kind: type, where: str) -> dict[str, Any]:
    """A mapping with exactly the fields of a dataclass."""
    wanted = {field.name for field in fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r} is no mapping: it must have the fields {', '.join(sorted(wanted))}")
    missing, unknown = sorted(wanted - values.keys()), sorted(map(str, values.keys() - wanted))
    if missing or unknown:
        faults = (f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names)
        raise ValueError(f"{where}: {', '.join(faults)}: the fields are {', '.join(sorted(wanted))}")
    return dict(values)


def _number(value: Any, where: str, *, smallest: float | None = None) -> float:
    fits = type(value) in (int, float) and math.isfinite(value)
    if not fits or (value <= 0.0 if smallest is None else value < smallest):
        wanted = "a positive number" if smallest is None else f"a number of at least {smallest:g}"
        raise ValueError(f"{where} is {value!r}: it must be {wanted}")
    return float(value)


def _band(values: Any, where: str) -> Band:
    if not isinstance(values, list) or len(values) != 2:
        raise ValueError(f"{where} is {values!r}: it must be a list [low, high]")
    low, high = (_number(value, where, smallest=0.0) for value in values)
    if not low <= high <= 1.0 or (low == 0.0 and not where.endswith("overlap")):
        raise ValueError(
            f"{where} is [{low:g}, {high:g}]: shares of a peak are above 0, at most 1, the lower one first"
        )
    return Band(low=low, high=high)
