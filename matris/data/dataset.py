"""Stores, or files prepared into a cache, as one random-access data set; and batches made of its samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from janus.data.packing import Budget
from janus.data.parallel_map import map_in_order
from janus.data.store import COPY_RECORDS, VERSION, StoreReader, gather
from matris.data.frames import FileKind, check_split_key, expand_path, file_kind
from matris.data.labels import LabelKeys
from matris.data.prepare import PrepareOptions, PrepareReport, check_wanted, prepare
from matris.data.records import LABEL_NAMES, Sample, samples_of
from matris.graph.batch import GraphBatch, LabelBatch, LabelTotals, collate_graphs, collate_labels
from matris.graph.build import build_graph, count_graph
from matris.graph.partition import partition_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelPresence:
    """Which records have which label, (n,) bool each."""

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    magmoms: np.ndarray


class StructureDataset:
    """Labelled structures of several stores, one after the other; read from disk when asked for.

    In memory it keeps the sizes, label masks and tasks of the records. Picklable; every process opens its own files.

    Attributes:
        stores: the files.
        sizes: (n, 3) int64 atoms, directed edges and angles of each record under the cutoffs.
        label_presence: which records have which label.
        task_names: levels of theory: those that the stores name, sorted, unless `joined` says others.
        task_index: (n,) int64 into `task_names`.
        report: which keys the labels came from.
    """

    def __init__(
        self,
        stores: Sequence[StoreReader],
        sizes: np.ndarray,
        *,
        records: np.ndarray | None = None,
        presence: LabelPresence | None = None,
        tasks: tuple[Sequence[str], np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            stores: with the fields of `matris.data.records`.
            sizes: of all records of all stores.
            records: records that the data set consists of, in its order; all by default.
            presence: labels of all records of all stores; read from these by default.
            tasks: names, and (n,) the number of each of all records, in place of what the stores say.
        """
        self.stores = tuple(stores)
        self._ends = list(accumulate(len(store) for store in stores))
        self._all_sizes = sizes
        self._records = records
        chosen = slice(None) if records is None else records
        self.sizes = sizes[chosen]
        if presence is None or tasks is None:
            overviews = [store.overview(["task"], LABEL_NAMES) for store in stores]
            presence = LabelPresence(
                **{name: np.concatenate([masks[name] for _, masks in overviews]) for name in LABEL_NAMES}
            )
            stated = np.concatenate([values["task"] for values, _ in overviews])
            tasks = tasks or _numbered(stated)
        self._all_presence = presence
        self.label_presence = LabelPresence(
            **{name: present[chosen] for name, present in vars(self._all_presence).items()}
        )
        self._tasks = tasks
        self.task_names, self.task_index = tuple(tasks[0]), tasks[1][chosen]
        self.report = PrepareReport.join(PrepareReport.of_store(store) for store in stores)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, in that order; less work each than one by one. None for a rank that has none in a step."""
        if not len(indices):
            return []
        columns = gather([self._locate(index) for index in indices])
        return samples_of(columns, tasks=[self.task_names[task] for task in self.task_index[list(indices)].tolist()])

    def identifier(self, index: int) -> str:
        """Where a record comes from, `file:frame`."""
        return self[index].identifier

    def subset(self, indices: np.ndarray) -> StructureDataset:
        """The records `indices`, in that order. Task names stay those of the whole."""
        records = indices if self._records is None else self._records[indices]
        return StructureDataset(
            self.stores, self._all_sizes, records=records, presence=self._all_presence, tasks=self._tasks
        )

    @staticmethod
    def joined(parts: Sequence[tuple[str, StructureDataset]], names: Sequence[str]) -> StructureDataset:
        """Data sets of several levels of theory as one, one after the other.

        Args:
            parts: each with the name of its level of theory, whatever its stores say.
            names: of all levels of theory, in the order of their numbers; some may have no part.
        """
        index = [np.full(len(part._all_sizes), names.index(name)) for name, part in parts]
        starts = np.cumsum([0, *(len(part._all_sizes) for _, part in parts)])
        records = [
            start + (np.arange(len(part)) if part._records is None else part._records)
            for start, (_, part) in zip(starts, parts, strict=False)
        ]
        return StructureDataset(
            [store for _, part in parts for store in part.stores],
            np.concatenate([part._all_sizes for _, part in parts]),
            records=np.concatenate(records),
            tasks=(names, np.concatenate(index)),
        )

    def column(self, name: str) -> np.ndarray:
        """(n,) a field that has one entry per record."""
        values = np.concatenate([store.column(name) for store in self.stores if len(store)])
        return values if self._records is None else values[self._records]

    def within(self, *, max_force: float | None, max_stress: float | None) -> StructureDataset:
        """The records whose longest force (eV/A) and largest stress component (eV/A^3) are at most these.

        Missing labels exceed nothing. Reads all labels once, in bounded memory.
        """
        if max_force is None and max_stress is None:
            return self
        largest = np.concatenate([_largest_labels(store) for store in self.stores if len(store)])
        chosen = largest if self._records is None else largest[self._records]
        limits = [np.inf if limit is None else limit for limit in (max_force, max_stress)]
        return self.subset(np.flatnonzero((chosen <= limits).all(axis=1)))

    def groups(self) -> np.ndarray:
        """(n,) number of each record's group; of stores that were prepared with a split key."""
        return np.unique(self.column("group"), return_inverse=True)[1]

    def split(
        self, fraction: float, seed: int, groups: np.ndarray | None = None
    ) -> tuple[StructureDataset, StructureDataset]:
        """The rest, and a random `fraction` of the records (at least one), each in the order of the files.

        Args:
            groups: (n,) number of each record's group; then whole groups are set aside, as many as bring their records
                nearest to the fraction.

        Raises:
            ValueError: a fraction outside 0..1, or so large that nothing is left.
        """
        count = max(1, round(fraction * len(self)))
        if not 0.0 < fraction < 1.0 or count >= len(self):
            raise ValueError(
                f"cannot set aside a fraction of {fraction:g} of {len(self)} records: choose between 0 and 1"
            )
        if groups is not None:
            aside = groups_aside(groups, count, seed)[groups]
            return self.subset(np.flatnonzero(~aside)), self.subset(np.flatnonzero(aside))
        order = np.random.default_rng(seed).permutation(len(self))
        return self.subset(np.sort(order[count:])), self.subset(np.sort(order[:count]))

    def _locate(self, index: int) -> tuple[StoreReader, int]:
        record = index if self._records is None else int(self._records[index])
        which = bisect_right(self._ends, record)
        return self.stores[which], record - (self._ends[which - 1] if which else 0)


def _numbered(tasks: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the levels of theory, sorted, and the number of each record's."""
    names, index = np.unique(tasks, return_inverse=True)
    return [name.decode() for name in names], index


def _largest_labels(store: StoreReader) -> np.ndarray:
    """(n, 2) longest force and largest stress component of each record; zero, as stores have it, where it has none."""
    found = np.zeros((len(store), 2))
    for start in range(0, len(store), COPY_RECORDS):
        stop = min(start + COPY_RECORDS, len(store))
        columns = store.columns(start, stop)
        lengths = np.linalg.norm(columns.values["forces"], axis=1)
        record = np.repeat(np.arange(start, stop), columns.counts["atoms"])
        np.maximum.at(found[:, 0], record, lengths)
        found[start:stop, 1] = np.abs(columns.values["stress"]).max(axis=(1, 2))
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
    stores, sizes = [], []
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
    dataset = StructureDataset(stores, np.concatenate(sizes))
    where = ", ".join(map(str, paths))
    if not len(dataset):
        raise ValueError(f"{where}: no structure at all")
    check_wanted(dataset.report, wanted, keys, where, option_prefix=option_prefix)
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


def _sizes(store: StoreReader, cache: Path, options: PrepareOptions, num_workers: int) -> np.ndarray:
    """Sizes under the wanted cutoffs: those of the store, or counted once and kept beside the cached stores."""
    cutoffs = (options.pairwise_cutoff, options.three_body_cutoff)
    if not len(store) or (store.attributes["pairwise_cutoff"], store.attributes["three_body_cutoff"]) == cutoffs:
        return store.column("size").reshape(-1, 3)
    stat = store.path.stat()
    name = f"{os.path.realpath(store.path)} {stat.st_size} {stat.st_mtime_ns} {cutoffs}"
    kept = cache / f"{store.path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.sizes.npy"
    if not kept.exists():
        logger.info("%s: counting edges and angles within %g and %g A", store.path, *cutoffs)
        ranges = [(start, min(start + COPY_RECORDS, len(store))) for start in range(0, len(store), COPY_RECORDS)]
        counted = np.concatenate(
            list(map_in_order(partial(_count, store=store, cutoffs=cutoffs), ranges, num_workers=num_workers))
        )
        cache.mkdir(parents=True, exist_ok=True)
        partial_file = kept.with_suffix(f".{os.getpid()}.partial")
        with open(partial_file, "wb") as file:
            np.save(file, counted)
        os.replace(partial_file, kept)
    return np.load(kept)


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


def label_totals(dataset: StructureDataset, indices: np.ndarray) -> LabelTotals:
    """Denominators of the loss terms over the global batch `indices`; needs no communication."""
    presence, num_atoms = dataset.label_presence, dataset.sizes[indices, 0]
    return LabelTotals(
        energy_structures=float(presence.energy[indices].sum()),
        forces_structures=float(presence.forces[indices].sum()),
        forces_atoms=float(num_atoms[presence.forces[indices]].sum()),
        stress_structures=float(presence.stress[indices].sum()),
        magmoms_atoms=float(num_atoms[presence.magmoms[indices]].sum()),
    )


def graph_budget(
    *, max_atoms: int | None = None, max_edges: int | None = None, max_angles: int | None = None
) -> Budget:
    """A budget over the columns of `StructureDataset.sizes`; None for no limit."""
    return Budget(limits=(max_atoms, max_edges, max_angles), names=("atoms", "edges", "angles"))
