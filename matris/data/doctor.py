"""What a data set holds and what is wrong with it, before anybody trains on it."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
from ase.data import covalent_radii
from tqdm import tqdm

from janus.data.parallel_map import map_in_order
from janus.data.store import StoreReader
from matris.data.consistency import (
    EnergyPairs,
    Evidence,
    Verdict,
    energy_pairs,
    judge_forces,
    judge_stress,
    pressure_slopes,
)
from matris.data.dataset import StructureDataset, open_dataset
from matris.data.frames import FileKind, expand_path, file_kind, refuse_idle_keys
from matris.data.prepare import PrepareOptions, PrepareReport, check_wanted, prepare
from matris.data.records import Sample
from matris.elements import SYMBOLS
from matris.graph.build import build_graph
from matris.units import GPA

OVERLAP = 0.3  # Angstrom: no two atoms are that close
CLOSE = 0.5  # of the sum of covalent radii
NET_FORCE = 0.1  # eV/A
PAIR_ATOMS = 4_000_000  # size of the arrays that compare the structures of a group
MAX_GROUPS = 300
RANGE = 256  # records examined at a time


class Severity(str, Enum):
    """A fatal finding makes training fail or meaningless; a warning deserves a look."""

    fatal = "fatal"
    warning = "warning"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong."""

    severity: Severity
    text: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Per structure, (n,) arrays; nan where a label is missing.

    Attributes:
        energy_per_atom: eV.
        max_force, net_force: largest force on an atom, length of the sum of all forces, eV/A.
        zero_forces: number of atoms with a force of exactly zero.
        pressure, max_stress: minus a third of the trace, and the largest component, eV/A^3.
        volume_per_atom: A^3; nan without a cell.
        shortest: shortest distance below 3 A, Angstrom; inf if there is none.
        shortest_pair: (n, 2) its elements.
        contact: shortest distance over the sum of its covalent radii.
        geometry, composition: hashes of the whole geometry, and of elements in order and pbc.
        elements: (n, 95) number of atoms of each element.
    """

    energy_per_atom: np.ndarray
    max_force: np.ndarray
    net_force: np.ndarray
    zero_forces: np.ndarray
    pressure: np.ndarray
    max_stress: np.ndarray
    volume_per_atom: np.ndarray
    shortest: np.ndarray
    shortest_pair: np.ndarray
    contact: np.ndarray
    geometry: np.ndarray
    composition: np.ndarray
    elements: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that `examine` found.

    Attributes:
        found: keys, counts and problems of reading.
        sizes: (n, 3) atoms, edges, angles.
        facts: per structure.
        forces, stress: whether the labels fit the energies.
        findings: what is wrong, fatal first.
        budgets: suggested limits of a micro-batch: atoms, edges, angles.
    """

    found: PrepareReport
    sizes: np.ndarray
    facts: Facts | None
    task_names: tuple[str, ...] = ()
    forces: Evidence | None = None
    stress: Evidence | None = None
    pairs: EnergyPairs | None = None
    findings: tuple[Finding, ...] = field(default=())
    budgets: tuple[int, int, int] | None = None

    @property
    def fatal(self) -> bool:
        return any(finding.severity is Severity.fatal for finding in self.findings)


def examine(
    paths: Sequence[str], options: PrepareOptions, *, num_workers: int = 0, progress: bool = False
) -> Diagnosis:
    """Read everything and judge it.

    Files that are not stores are prepared into a temporary one, without the frames that cannot be used: those are
    fatal findings.

    Args:
        options: label keys, cutoffs, and the labels that must be present.
    Raises:
        ValueError: a path that cannot be read at all.
    """
    refuse_idle_keys(paths, options.keys)
    with tempfile.TemporaryDirectory(prefix="janus-matris-doctor-") as folder:
        stores, reports = [], []
        for number, path in enumerate(paths):
            files = expand_path(path)
            if file_kind(files[0]) is FileKind.store:
                reports += [PrepareReport.of_store(StoreReader(file)) for file in files]
                stores += files
                continue
            output = Path(folder) / f"{number}.h5"
            reports.append(prepare(files, output, options, num_workers=num_workers, progress=progress, strict=False))
            if reports[-1].num_frames:
                stores.append(str(output))
        found = PrepareReport.join(reports)
        findings = [_fatal(problem) for problem in found.problems]
        if not found.num_frames:
            findings.append(_fatal("no usable structure"))
            return Diagnosis(found=found, sizes=np.empty((0, 3), np.int64), facts=None, findings=tuple(findings))
        dataset = open_dataset(
            stores,
            pairwise_cutoff=options.pairwise_cutoff,
            three_body_cutoff=options.three_body_cutoff,
            wanted=(),
            cache_dir=folder,
            num_workers=num_workers,
        )
        for store in dataset.stores:
            store.verify()
        facts = _gather_facts(dataset, num_workers, progress)
        pairs, slopes = _compare(dataset, facts)
        forces, stress = judge_forces(pairs), judge_stress(pairs, slopes)
        try:
            check_wanted(found, options.wanted, options.keys, "data")
        except ValueError as error:
            findings.append(_fatal(str(error)))
        else:
            findings += _judge_presence(dataset)
        findings += _judge_labels(dataset, facts, forces, stress)
        findings += _judge_geometry(dataset, facts)
        findings.sort(key=lambda finding: finding.severity is not Severity.fatal)
        return Diagnosis(
            found=found,
            sizes=dataset.sizes,
            facts=facts,
            task_names=dataset.task_names,
            forces=forces,
            stress=stress,
            pairs=pairs,
            findings=tuple(findings),
            budgets=suggest_budgets(dataset.sizes),
        )


def suggest_budgets(sizes: np.ndarray, structures: int = 16) -> tuple[int, int, int]:
    """Limits of atoms, edges and angles that hold about `structures` average records, and any single one."""
    needed = np.maximum(structures * sizes.mean(axis=0), sizes.max(axis=0)).astype(np.int64)
    atoms, edges, angles = (_round_up(int(value)) for value in needed)
    return atoms, edges, angles


def _round_up(value: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return max(1, -(-value // unit) * unit)


def _gather_facts(dataset: StructureDataset, num_workers: int, progress: bool) -> Facts:
    ranges = [range(start, min(start + RANGE, len(dataset))) for start in range(0, len(dataset), RANGE)]
    parts: list[Facts] = []
    with tqdm(total=len(dataset), desc="examine", unit="", disable=not progress, mininterval=0.5) as bar:
        for part in map_in_order(partial(_facts_of_range, dataset=dataset), ranges, num_workers=num_workers):
            parts.append(part)
            bar.update(len(part.shortest))
    return _join(parts)


def _facts_of_range(indices: range, dataset: StructureDataset) -> Facts:
    return _join([_facts(dataset[index]) for index in indices])


def _join(parts: Sequence[Facts]) -> Facts:
    return Facts(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def _facts(sample: Sample) -> Facts:
    structure, labels = sample.structure, sample.labels
    nan = float("nan")
    lengths = np.full(structure.num_atoms, nan) if labels.forces is None else np.linalg.norm(labels.forces, axis=1)
    volume = abs(np.linalg.det(structure.cell))
    graph = build_graph(structure, pairwise_cutoff=3.0, three_body_cutoff=1e-6)
    shortest, pair = np.inf, (0, 0)
    if graph.num_edges:
        source = structure.positions[graph.edge_source] + graph.edge_image @ structure.cell
        distances = np.linalg.norm(structure.positions[graph.edge_target] - source, axis=1)
        edge = int(distances.argmin())
        shortest = float(distances[edge])
        pair = tuple(sorted((structure.numbers[graph.edge_target[edge]], structure.numbers[graph.edge_source[edge]])))
    row = {
        "energy_per_atom": nan if labels.energy is None else labels.energy / structure.num_atoms,
        "max_force": lengths.max(),
        "net_force": nan if labels.forces is None else float(np.linalg.norm(labels.forces.sum(axis=0))),
        "zero_forces": int((lengths == 0.0).sum()),
        "pressure": nan if labels.stress is None else -float(np.trace(labels.stress)) / 3.0,
        "max_stress": nan if labels.stress is None else float(np.abs(labels.stress).max()),
        "volume_per_atom": volume / structure.num_atoms if volume > 0.0 else nan,
        "shortest": shortest,
        "shortest_pair": pair,
        "contact": shortest / (covalent_radii[pair[0]] + covalent_radii[pair[1]]),
        "geometry": _hash(structure.numbers, structure.pbc, structure.positions.round(5), structure.cell.round(5)),
        "composition": _hash(structure.numbers, structure.pbc),
        "elements": np.bincount(structure.numbers, minlength=len(SYMBOLS)),
    }
    return Facts(**{name: np.asarray(value)[None] for name, value in row.items()})


def _hash(*arrays: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array + 0).tobytes())  # + 0 turns -0.0 into 0.0
    return int.from_bytes(digest.digest(), "little", signed=True)


def _compare(dataset: StructureDataset, facts: Facts) -> tuple[EnergyPairs, np.ndarray]:
    """Pairs of similar structures, and slopes of pressure against volume, within groups of the same atoms."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(facts.composition.tolist(), dataset.task_index.tolist(), strict=True)):
        groups[key].append(index)
    pairs, slopes = [], [np.empty(0)]
    for group in sorted(groups.values(), key=len, reverse=True)[:MAX_GROUPS]:
        size = int(min(200, (PAIR_ATOMS / dataset.sizes[group[0], 0]) ** 0.5))
        if len(group) < 2 or size < 2:
            continue
        # An even choice over the files, in which neighbours are often similar.
        chosen = np.array(group)[np.unique(np.linspace(0, len(group) - 1, min(size, len(group))).astype(int))]
        pairs.append(energy_pairs([dataset[int(index)] for index in chosen]))
        known = chosen[np.isfinite(facts.pressure[chosen]) & np.isfinite(facts.volume_per_atom[chosen])]
        slopes.append(pressure_slopes(facts.volume_per_atom[known], facts.pressure[known]))
    return EnergyPairs.join(pairs), np.concatenate(slopes)


def _judge_presence(dataset: StructureDataset) -> Iterable[Finding]:
    presence = dataset.label_presence
    if presence.energy.any():
        return
    keys = f"keys in the data: {', '.join(dataset.report.keys) or 'none'}"
    if any(mask.any() for mask in vars(presence).values()):
        yield _warning(f"no structure has an energy, so forces and stress cannot be compared with energies; {keys}")
    else:
        yield _fatal(f"no structure has any label; {keys}. Give the keys of the labels (--energy_key, ...)")


def _judge_labels(dataset: StructureDataset, facts: Facts, forces: Evidence, stress: Evidence) -> Iterable[Finding]:
    if forces.verdict is Verdict.wrong:
        yield _fatal(f"forces do not fit the energies: {forces.text}")
    if stress.verdict is Verdict.wrong:
        yield _fatal(f"stress does not fit the energies: {stress.text}")
    # Without the forces on held atoms the rest do not add up to zero; by symmetry alone they would.
    held = (facts.zero_forces > 0) & (facts.zero_forces < dataset.sizes[:, 0]) & (facts.net_force > NET_FORCE)
    if held.any():
        yield _warning(
            f"{_some(dataset, held)}: atoms with a force of exactly zero while the others do not add up to zero; "
            "probably written with constraints applied, which zeroes training labels"
        )
    drifting = (facts.net_force > NET_FORCE) & ~held
    if drifting.any():
        yield _warning(
            f"{_some(dataset, drifting)}: forces add up to more than {NET_FORCE} eV/A "
            f"(at most {np.nanmax(facts.net_force):.3g}); not fully converged, or an external field"
        )
    same, conflicting = _duplicates(facts, dataset.task_index)
    if same:
        yield _warning(f"{same} structures repeat the geometry of another one")
    if conflicting:
        yield _warning(f"{conflicting} of them with an energy that differs by more than 1 meV/atom")


def _duplicates(facts: Facts, task_index: np.ndarray) -> tuple[int, int]:
    """Records with the geometry and task of an earlier one, and those of them whose energy differs."""
    first: dict[tuple[int, int], int] = {}
    same = conflicting = 0
    for index, key in enumerate(zip(facts.geometry.tolist(), task_index.tolist(), strict=True)):
        earlier = first.setdefault(key, index)
        if earlier != index:
            same += 1
            conflicting += bool(abs(facts.energy_per_atom[index] - facts.energy_per_atom[earlier]) > 1e-3)
    return same, conflicting


def _judge_geometry(dataset: StructureDataset, facts: Facts) -> Iterable[Finding]:
    overlapping = facts.shortest < OVERLAP
    if overlapping.any():
        yield _fatal(f"{_some(dataset, overlapping)}: atoms closer than {OVERLAP} A; the shortest {_shortest(facts)}")
    close = (facts.contact < CLOSE) & ~overlapping
    if close.any():
        yield _warning(
            f"{_some(dataset, close)}: atoms closer than {CLOSE} of the sum of their covalent radii; the shortest "
            f"{_shortest(facts)}"
        )
    alone = dataset.sizes[:, 1] == 0
    if alone.any():
        counts = Counter(dataset.sizes[alone, 0].tolist())
        which = ", ".join(f"{count} of {atoms} atom{'s' * (atoms > 1)}" for atoms, count in sorted(counts.items()))
        yield _warning(f"{int(alone.sum())} structures have no neighbours within the cutoff ({which})")


def _shortest(facts: Facts) -> str:
    which = int(facts.shortest.argmin())
    first, second = (SYMBOLS[number] for number in facts.shortest_pair[which])
    return f"{facts.shortest[which]:.3f} A ({first}-{second})"


def _some(dataset: StructureDataset, mask: np.ndarray) -> str:
    """`3 structures (a, b, ...)`"""
    which = np.nonzero(mask)[0]
    names = ", ".join(dataset.identifier(int(index)) for index in which[:3])
    return f"{len(which)} structures ({names}{', ...' if len(which) > 3 else ''})"


def _fatal(text: str) -> Finding:
    return Finding(severity=Severity.fatal, text=text)


def _warning(text: str) -> Finding:
    return Finding(severity=Severity.warning, text=text)


def describe_ranges(diagnosis: Diagnosis) -> list[tuple[str, str, float, float, float]]:
    """Rows of (quantity, unit, smallest, median, largest) over the structures that have it."""
    if diagnosis.facts is None:
        return []
    facts, sizes = diagnosis.facts, diagnosis.sizes
    quantities = (
        ("atoms", "", sizes[:, 0].astype(float)),
        ("edges", "", sizes[:, 1].astype(float)),
        ("angles", "", sizes[:, 2].astype(float)),
        ("energy", "eV/atom", facts.energy_per_atom),
        ("largest force", "eV/A", facts.max_force),
        ("net force", "eV/A", facts.net_force),
        ("pressure", "eV/A^3", facts.pressure),
        ("pressure", "GPa", facts.pressure / GPA),
        ("volume", "A^3/atom", facts.volume_per_atom),
        ("shortest distance", "A", np.where(np.isinf(facts.shortest), np.nan, facts.shortest)),
    )
    return [
        (name, unit, float(known.min()), float(np.median(known)), float(known.max()))
        for name, unit, values in quantities
        if len(known := values[np.isfinite(values)])
    ]
