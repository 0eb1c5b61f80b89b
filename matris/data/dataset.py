"""Stores, or files prepared into a cache, as one random-access data set; and batches made of its samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache as cached
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from janus.data.exclusive import write_once
from janus.data.packing import Budget
from janus.data.parallel_map import map_in_order
from janus.data.shared_rows import blocks, mapped_rows, shared_rows
from janus.data.store import COPY_RECORDS, VERSION, Columns, Range, StoreReader, gather, overview
from matris.data.frames import FileKind, check_split_key, expand_path, file_kind
from matris.data.labels import LabelKeys
from matris.data.prepare import PrepareOptions, PrepareReport, check_wanted, prepare
from matris.data.records import LABEL_NAMES, Sample, samples_of
from matris.graph.batch import GraphBatch, LabelBatch, LabelTotals, collate_graphs, collate_labels
from matris.graph.build import build_graph, count_graph
from matris.graph.partition import partition_batch
from matris.writable import check_writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelPresence:
    """Which records have which label, (n,) bool each."""

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    magmoms: np.ndarray


ROW = np.dtype(
    [
        ("place", "<i8"),
        ("sizes", "<i8", (3,)),
        *((name, "?") for name in LABEL_NAMES),
        ("task", "<u4"),
    ]
)
"""What is known of a record without reading it: its number among those of all stores, atoms, directed edges and angles,
which labels it has, and the number of its level of theory."""


class StructureDataset:
    """Labelled structures of several stores, one after the other; read from disk when asked for.

    A row of numbers for each is kept, of which large data sets have one copy for all processes of a machine
    (`janus.data.shared_rows`). Picklable; every process opens its own files.

    Attributes:
        stores: the files.
        task_names: levels of theory: those that the stores name, sorted, unless `joined` says others.
    """

    def __init__(
        self,
        stores: Sequence[StoreReader],
        task_names: Sequence[str],
        rows: Callable[[], Iterable[np.ndarray]],
        *,
        at_most: int,
        cache: Path,
        key: Any = None,
    ) -> None:
        """
        Args:
            stores: with the fields of `matris.data.records`.
            task_names: that the rows' tasks count.
            rows: gives `ROW` of each record, in the order of the data set, in parts.
            at_most: bound of the number of rows.
            cache: folder for rows that are shared.
            key: what the rows follow from, JSON; None for rows of this process alone.
        """
        self.stores, self.task_names = tuple(stores), tuple(task_names)
        self._ends = np.cumsum([len(store) for store in stores])
        self._cache, self._key = cache, key
        self._rows, self._file = shared_rows(rows, ROW, at_most=at_most, key=key, folder=cache)

    @cached_property
    def report(self) -> PrepareReport:
        """Which keys the labels came from."""
        return PrepareReport.join(PrepareReport.of_store(store) for store in self.stores)

    @property
    def sizes(self) -> np.ndarray:
        """(n, 3) int64 atoms, directed edges and angles of each record under the cutoffs."""
        return self._rows["sizes"]

    @property
    def label_presence(self) -> LabelPresence:
        """Which records have which label."""
        return LabelPresence(**{name: self._rows[name] for name in LABEL_NAMES})

    @property
    def task_index(self) -> np.ndarray:
        """(n,) uint32 into `task_names`."""
        return self._rows["task"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, in that order; less work each than one by one. None for a rank that has none in a step."""
        if not len(indices):
            return []
        rows = self._rows[list(indices)]
        columns = gather(self._ranges(rows["place"]))
        return samples_of(columns, tasks=[self.task_names[task] for task in rows["task"].tolist()])

    def identifier(self, index: int) -> str:
        """Where a record comes from, `file:frame`."""
        return self[index].identifier

    def subset(self, records: np.ndarray | slice) -> StructureDataset:
        """These records, in that order. Task names stay those of the whole."""
        rows = self._rows[records]
        return StructureDataset(self.stores, self.task_names, lambda: [rows], at_most=len(rows), cache=self._cache)

    def task_runs(self) -> list[tuple[int, slice]]:
        """Consecutive records of one level of theory: its number, and which they are."""
        starts = [0]
        for part in blocks(len(self)):
            task = self.task_index[max(0, part.start - 1) : part.stop]
            starts += (np.flatnonzero(np.diff(task)) + max(1, part.start)).tolist()
        runs = zip(starts, [*starts[1:], len(self)], strict=True)
        return [(int(self.task_index[start]), slice(start, stop)) for start, stop in runs if start < stop]

    def by_task(self) -> dict[str, StructureDataset]:
        """The records of each level of theory that has any, in the order of its number."""
        found: dict[int, list[slice]] = {}
        for task, run in self.task_runs():
            found.setdefault(task, []).append(run)
        return {
            self.task_names[task]: self.subset(
                runs[0] if len(runs) == 1 else np.concatenate([np.arange(run.start, run.stop) for run in runs])
            )
            for task, runs in sorted(found.items())
        }

    @staticmethod
    def joined(parts: Sequence[tuple[str, StructureDataset]], names: Sequence[str]) -> StructureDataset:
        """Data sets of several levels of theory as one, one after the other.

        Args:
            parts: each with the name of its level of theory, whatever its stores say.
            names: of all levels of theory, in the order of their numbers; some may have no part.
        """

        def rows() -> Iterator[np.ndarray]:
            before = 0
            for name, part in parts:
                for block in blocks(len(part)):
                    own = part._rows[block].copy()
                    own["place"] += before
                    own["task"] = names.index(name)
                    yield own
                before += sum(map(len, part.stores))

        return StructureDataset(
            [store for _, part in parts for store in part.stores],
            names,
            rows,
            at_most=sum(len(part) for _, part in parts),
            cache=parts[0][1]._cache,
            key=_key_of([part._key for _, part in parts], "joined", [name for name, _ in parts], list(names)),
        )

    def column(self, name: str) -> np.ndarray:
        """(n,) a field that has one entry per record."""
        return np.concatenate([part[name] for part in self.columns([name])])

    def columns(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Fields that have one entry per record, (_,) each, of consecutive records."""
        return (overview(ranges, names)[0] for _, ranges in self._parts())

    def elements(self) -> np.ndarray:
        """Atomic numbers that there are, sorted. Reads all structures once, in bounded memory."""
        found: set[int] = set()
        for _, ranges in self._parts():
            found.update(np.unique(gather(ranges).values["numbers"]).tolist())
        return np.array(sorted(found))

    def within(self, *, max_force: float | None, max_stress: float | None) -> StructureDataset:
        """The records whose longest force (eV/A) and largest stress component (eV/A^3) are at most these.

        Missing labels exceed nothing. Reads all labels once, in bounded memory.
        """
        if max_force is None and max_stress is None:
            return self
        limits = [np.inf if limit is None else limit for limit in (max_force, max_stress)]

        def rows() -> Iterator[np.ndarray]:
            for own, ranges in self._parts():
                yield own[(_largest_labels(gather(ranges)) <= limits).all(axis=1)]

        return self._derived(rows, "within", max_force, max_stress)

    def groups(self) -> np.ndarray:
        """(n,) number of each record's group; of stores that were prepared with a split key."""
        return np.unique(self.column("group"), return_inverse=True)[1]

    def split(self, fraction: float, seed: int, *, by_group: bool = False) -> tuple[StructureDataset, StructureDataset]:
        """The rest, and a random `fraction` of the records (at least one), each in the order of the files.

        Args:
            by_group: set whole groups aside, as many as bring their records nearest to the fraction.

        Raises:
            ValueError: a fraction outside 0..1, or so large that nothing is left; a single group.
        """
        count = max(1, round(fraction * len(self)))
        if not 0.0 < fraction < 1.0 or count >= len(self):
            raise ValueError(
                f"cannot set aside a fraction of {fraction:g} of {len(self)} records: choose between 0 and 1"
            )

        @cached
        def aside() -> np.ndarray:  # by the process that writes the rows
            if by_group:
                groups = self.groups()
                return groups_aside(groups, count, seed)[groups]
            chosen = np.zeros(len(self), dtype=bool)
            chosen[np.random.default_rng(seed).permutation(len(self))[:count]] = True
            return chosen

        def rows(wanted: bool) -> Iterator[np.ndarray]:
            return (self._rows[block][aside()[block] == wanted] for block in blocks(len(self)))

        facts = ("split", fraction, seed, by_group)
        return self._derived(partial(rows, False), *facts, "rest"), self._derived(partial(rows, True), *facts, "aside")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self._file is None else {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            self._rows = mapped_rows(self._file, ROW)

    def _derived(self, rows: Callable[[], Iterable[np.ndarray]], *facts: Any) -> StructureDataset:
        """Some of the records; which they are follows from these facts."""
        return StructureDataset(
            self.stores,
            self.task_names,
            rows,
            at_most=len(self),
            cache=self._cache,
            key=_key_of([self._key], *facts),
        )

    def _parts(self) -> Iterator[tuple[np.ndarray, list[Range]]]:
        """Rows of consecutive records, few enough to read, and where the records are."""
        for block in blocks(len(self), COPY_RECORDS):
            rows = self._rows[block]
            yield rows, self._ranges(rows["place"])

    def _ranges(self, places: np.ndarray) -> list[Range]:
        """Where records are, (n,) by their places in all stores; those that follow one another together."""
        which = np.searchsorted(self._ends, places, side="right")
        local = places - np.concatenate([[0], self._ends])[which]
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(which) != 0))
        firsts, lasts = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(places) - 1]])
        return [
            (self.stores[store], start, last + 1)
            for store, start, last in zip(
                which[firsts].tolist(), local[firsts].tolist(), local[lasts].tolist(), strict=True
            )
        ]


def _key_of(sources: list[Any], *facts: Any) -> Any:
    """Of rows that follow from those of other data sets and these facts; None where one of those has no key."""
    return None if None in sources else [sources, *facts]


def _opened_rows(
    stores: Sequence[StoreReader], counted: Sequence[np.ndarray | None], task_names: Sequence[str]
) -> Iterator[np.ndarray]:
    """`ROW` of all records, with the sizes that were counted anew, or those of the store."""
    names = np.array([name.encode() for name in task_names])
    before = 0
    for store, sizes in zip(stores, counted, strict=True):
        for block in blocks(len(store), COPY_RECORDS):
            fields, masks = overview([(store, block.start, block.stop)], ["task", "size"], LABEL_NAMES)
            rows = np.empty(block.stop - block.start, ROW)
            rows["place"] = np.arange(before + block.start, before + block.stop)
            rows["sizes"] = fields["size"] if sizes is None else sizes[block]
            for name, present in masks.items():
                rows[name] = present
            rows["task"] = np.searchsorted(names, fields["task"])
            yield rows
        before += len(store)


def _largest_labels(columns: Columns) -> np.ndarray:
    """(n, 2) longest force and largest stress component of each record; zero, as stores have it, where it has none."""
    found = np.zeros((columns.num_records, 2))
    record = np.repeat(np.arange(columns.num_records), columns.counts["atoms"])
    np.maximum.at(found[:, 0], record, np.linalg.norm(columns.values["forces"], axis=1))
    found[:, 1] = np.abs(columns.values["stress"]).max(axis=(1, 2))
    return found


def groups_aside(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which groups to set aside, (number of groups,) bool: at random, at least one, never all, about `count` records.

    Raises:
        ValueError: a single group.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise ValueError(f"all {len(groups)} records are in one group: a split by groups needs at least two")
    aside = np.zeros(len(sizes), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = 0
    for group in order:
        if abs(taken + sizes[group] - count) < abs(taken - count) and aside.sum() < len(sizes) - 1:
            aside[group], taken = True, taken + sizes[group]
    if not taken:  # every group is larger than twice the wanted number
        aside[order[np.argmin(sizes[order])]] = True
    return aside


def open_dataset(
    paths: Sequence[str],
    *,
    pairwise_cutoff: float,
    three_body_cutoff: float,
    keys: LabelKeys | None = None,
    wanted: Sequence[str] = ("energy",),
    cache_dir: Path | str | None = None,
    num_workers: int = 0,
    progress: bool = False,
    split_key: str | None = None,
    option_prefix: str = "--",
) -> StructureDataset:
    """Stores as they are; other files prepared on first use into a cache, by one process while others wait.

    Args:
        paths: stores (.h5) or any files that `janus-matris prepare` takes.
        pairwise_cutoff, three_body_cutoff: of the model, Angstrom; stores counted with others are recounted once.
        keys: where the labels of other files are; a caller who takes them from a user checks with `refuse_idle_keys`
            that they are not idle.
        wanted: labels that must be in at least one record of all paths together.
        cache_dir: `~/.cache/janus-matris` by default; entries are named by path, size and time of change of the
            file and by the options, so they never go stale.
        num_workers: processes that prepare.
        progress: show bars.
        split_key: info entry by which the records are grouped; stores must have been prepared with it.
        option_prefix: of the options for keys, as messages name them.
    Raises:
        ValueError: unreadable or corrupt files, a wanted label found nowhere, no record.
    """
    if not paths:
        raise ValueError("no data files given")
    cache = Path(cache_dir) if cache_dir is not None else Path.home() / ".cache" / "janus-matris"
    keys = keys or LabelKeys()
    # Labels are looked for in all paths together, so none is wanted of a single file.
    options = PrepareOptions(
        keys=keys,
        wanted=(),
        pairwise_cutoff=pairwise_cutoff,
        three_body_cutoff=three_body_cutoff,
        split_key=split_key,
    )
    stores: list[StoreReader] = []
    sizes: list[np.ndarray | None] = []
    for path in paths:
        files = expand_path(str(path))
        if file_kind(files[0]) is not FileKind.store:
            files = [str(_prepare_into_cache(str(path), files, cache, options, num_workers, progress, option_prefix))]
        for file in files:
            store = StoreReader(file)
            if split_key is not None:
                check_split_key(store, split_key)
            stores.append(store)
            sizes.append(_sizes(store, cache, options, num_workers))
    report = PrepareReport.join(PrepareReport.of_store(store) for store in stores)
    dataset = StructureDataset(
        stores,
        report.tasks,
        partial(_opened_rows, stores, sizes, report.tasks),
        at_most=sum(map(len, stores)),
        cache=cache,
        key=[VERSION, pairwise_cutoff, three_body_cutoff, *(_state_of(store) for store in stores)],
    )
    where = ", ".join(map(str, paths))
    if not len(dataset):
        raise ValueError(f"{where}: no structure at all")
    check_wanted(report, wanted, keys, where, option_prefix=option_prefix)
    return dataset


def _prepare_into_cache(
    path: str,
    files: list[str],
    cache: Path,
    options: PrepareOptions,
    num_workers: int,
    progress: bool,
    option_prefix: str,
) -> Path:
    stats = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([VERSION, stats, asdict(options)]).encode()).hexdigest()[:16]
    output = cache / f"{Path(path).name}-{digest}.h5"
    if not output.exists():
        logger.info("preparing %s into %s", path, output)
        # Files under their real names: the same file reached by another way is the same entry.
        prepare(
            [real for real, _, _ in stats],
            output,
            options,
            num_workers=num_workers,
            progress=progress,
            wait=True,
            option_prefix=option_prefix,
        )
    return output


def _sizes(store: StoreReader, cache: Path, options: PrepareOptions, num_workers: int) -> np.ndarray | None:
    """Sizes under the wanted cutoffs, counted once and kept beside the cached stores; None for those of the store."""
    cutoffs = (options.pairwise_cutoff, options.three_body_cutoff)
    if not len(store) or (store.attributes["pairwise_cutoff"], store.attributes["three_body_cutoff"]) == cutoffs:
        return None
    name = f"{VERSION} {' '.join(map(str, _state_of(store)))} {cutoffs}"
    kept = cache / f"{store.path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.sizes.npy"
    if not kept.exists():
        check_writable(cache)  # before the work
        logger.info("%s: counting edges and angles within %g and %g A", store.path, *cutoffs)
        write_once(kept, partial(_write_sizes, store=store, cutoffs=cutoffs, num_workers=num_workers))
    return np.load(kept, mmap_mode="r")


def _write_sizes(path: Path, *, store: StoreReader, cutoffs: tuple[float, float], num_workers: int) -> None:
    ranges = [(part.start, part.stop) for part in blocks(len(store), COPY_RECORDS)]
    work = partial(_count, store=store, cutoffs=cutoffs)
    counted = np.lib.format.open_memmap(path, "w+", np.int64, (len(store), 3))
    for (start, stop), sizes in zip(ranges, map_in_order(work, ranges, num_workers=num_workers), strict=True):
        counted[start:stop] = sizes
    counted.flush()


def _state_of(store: StoreReader) -> list[Any]:
    """Which file it is, and in which state."""
    stat = store.path.stat()
    return [os.path.realpath(store.path), stat.st_size, stat.st_mtime_ns]


def _count(records: tuple[int, int], store: StoreReader, cutoffs: tuple[float, float]) -> np.ndarray:
    sizes = [
        count_graph(sample.structure, pairwise_cutoff=cutoffs[0], three_body_cutoff=cutoffs[1])
        for sample in samples_of(store.columns(*records))
    ]
    return np.array([(size.num_atoms, size.num_edges, size.num_angles) for size in sizes], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples as the model and the loss take them; on a graph axis this rank's part of their atoms.

    Attributes:
        graph: their graphs.
        labels: their labels with masks.
        identifiers: where each structure comes from.
    """

    graph: GraphBatch
    labels: LabelBatch
    identifiers: tuple[str, ...]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(
            graph=self.graph.to(device),
            labels=self.labels.to(device),
            identifiers=self.identifiers,
        )

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory."""
        return MicroBatch(
            graph=self.graph.pin_memory(),
            labels=self.labels.pin_memory(),
            identifiers=self.identifiers,
        )


@dataclass(frozen=True, kw_only=True)
class Collate:
    """Samples to a `MicroBatch`: builds the graphs. Runs in the loader's worker processes.

    Attributes:
        pairwise_cutoff, three_body_cutoff: Angstrom.
        task_names: in the order of their numbers.
        num_parts, part: of the graphs, over the ranks that share them; the result is one part.
        partitioner: how they are divided, see `janus.graph_parallel.partition.assign_owners`.
    """

    pairwise_cutoff: float
    three_body_cutoff: float
    task_names: tuple[str, ...]
    num_parts: int = 1
    part: int = 0
    partitioner: str = "morton"

    def __call__(self, samples: Sequence[Sample]) -> MicroBatch:
        graphs = [
            build_graph(
                sample.structure, pairwise_cutoff=self.pairwise_cutoff, three_body_cutoff=self.three_body_cutoff
            )
            for sample in samples
        ]
        graph = collate_graphs(
            graphs,
            tasks=[self.task_names.index(sample.task) for sample in samples],
            charges=[sample.charge for sample in samples],
            spins=[sample.spin for sample in samples],
        )
        labels = collate_labels([sample.labels for sample in samples], [graph.num_atoms for graph in graphs])
        if self.num_parts > 1:
            graph, labels = partition_batch(
                graph, labels, num_parts=self.num_parts, part=self.part, partitioner=self.partitioner
            )
        return MicroBatch(
            graph=graph,
            labels=labels,
            identifiers=tuple(sample.identifier for sample in samples),
        )


def label_totals(dataset: StructureDataset, indices: np.ndarray | None = None) -> LabelTotals:
    """Denominators of the loss terms over the global batch `indices`, or over all; needs no communication."""
    presence, num_atoms = dataset.label_presence, dataset.sizes[:, 0]
    structures, atoms = dict.fromkeys(LABEL_NAMES, 0.0), dict.fromkeys(LABEL_NAMES, 0.0)
    for part in blocks(len(dataset)) if indices is None else (indices,):
        of_each = num_atoms[part]
        for name in LABEL_NAMES:
            present = getattr(presence, name)[part]
            structures[name] += float(present.sum())
            atoms[name] += float(of_each[present].sum())
    return LabelTotals(
        energy_structures=structures["energy"],
        forces_structures=structures["forces"],
        forces_atoms=atoms["forces"],
        stress_structures=structures["stress"],
        magmoms_atoms=atoms["magmoms"],
    )


def graph_budget(
    *, max_atoms: int | None = None, max_edges: int | None = None, max_angles: int | None = None
) -> Budget:
    """A budget over the columns of `StructureDataset.sizes`; None for no limit."""
    return Budget(limits=(max_atoms, max_edges, max_angles), names=("atoms", "edges", "angles"))
