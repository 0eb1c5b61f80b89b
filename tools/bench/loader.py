"""How fast structures come from a store, what packing them costs, how long steps wait for them, and in which memory.

    OMP_NUM_THREADS=1 python -m tools.bench.loader --data shared/data/mp_crystals/train.xyz.gz --output loader.json

Reading: the same structures with all their labels, in the same random order, in this process: from a store as the
loader's workers do it (a micro-batch at a time), and one by one; from an ASE db (SQLite) that stays open, with the
labels asked of the atoms, and without asking; and from a store as micro-batches with their graphs. By turns (ABC, CBA,
...), each structure once per turn. That store and db hold the same is checked first, to the last bit. The db holds
these structures alone, the store all.
Packing: global batches of all data over 64 ranks; the largest load over the mean, and what it is at least, since
structures are whole. Waiting: the column `data_wait` of a short training run. Memory: what a process of its own has
private, beyond its imports, with the data set open and batches planned, and after reading at random; of copies of the
data, one after the other in a store. A first process writes what is shared by all, another one is measured: of each
record `shared_bytes_per_record` are in a file that all map, or, of small data sets, with each. HDF5's cache is bounded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.stress import full_3x3_to_voigt_6_stress

from janus.data.loader import StepLoader
from janus.data.packing import Budget, plan_micro_batches
from janus.data.sampler import GlobalBatchSampler
from janus.data.store import StoreReader, StoreWriter
from janus.telemetry.csv_log import read_csv
from matris.calibration import formula_cost
from matris.data.dataset import Collate, StructureDataset, open_dataset
from matris.data.records import Sample
from matris.presets import PRESETS
from matris.run import run_training
from matris.train_config import DataConfig, TrainConfig, TrainingConfig
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report

_RANKS = 64
_READS = 2000
"""Of structures at random, after which the memory is read."""
_PLANS = 20
"""Of global batches, before."""


def main(words: list[str] | None = None) -> int:
    """Prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--data", nargs="+", required=True, help="files or folders of structures")
    parser.add_argument("--structures", type=at_least(1), default=500, help="that are read in a turn")
    parser.add_argument("--micro_batch", type=at_least(1), default=16, help="structures that are read at a time")
    parser.add_argument("--turns", type=at_least(1), default=6, help="of reading, each way once in each")
    parser.add_argument("--copies", type=at_least(1), nargs="+", default=[1, 4, 16], help="of the data, for the memory")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="s", help="of the run that waits for its data")
    parser.add_argument("--steps", type=at_least(1), default=12, help="updates of that run")
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        default=8,
        help="structures per update of that run, in one micro-batch: 8 crystals can take 16 GB and more with preset s",
    )
    parser.add_argument(
        "--num_workers", type=at_least(0), nargs="+", default=[0, 1], help="of that run, one run for each"
    )
    parser.add_argument("--cache_dir", help="of what is prepared (default: ~/.cache/janus-matris)")
    add_output(parser, required=True)
    options = parser.parse_args(words)
    hyper = PRESETS[options.preset]
    dataset = open_dataset(
        options.data,
        pairwise_cutoff=hyper.pairwise_cutoff,
        three_body_cutoff=hyper.three_body_cutoff,
        cache_dir=options.cache_dir,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], Any]] = {
            "data": lambda: {"structures": len(dataset), "mean_sizes": dataset.sizes.mean(axis=0).tolist()},
            "reading": lambda: _reading(dataset, options, Path(folder)),
            "packing": lambda: _packing(dataset, formula_cost(hyper).of_records(dataset.sizes)),
            "waiting": lambda: {str(count): _waiting(options, count, Path(folder)) for count in options.num_workers},
            "memory": lambda: [_memory(dataset, copies, Path(folder)) for copies in options.copies],
        }
        found = {}
        for name, part in parts.items():
            found[name] = part()
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    write_report(options.output, found)
    return 0


def _reading(dataset: StructureDataset, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Structures/s of each way, and ratios of the store's to those of the ASE db in the same turn."""
    hyper = PRESETS[options.preset]
    chosen = np.random.default_rng(0).permutation(len(dataset))[: options.structures].tolist()
    parts = [chosen[start : start + options.micro_batch] for start in range(0, len(chosen), options.micro_batch)]
    rows = {index: row for row, index in enumerate(sorted(chosen), start=1)}  # as the db numbers them
    collate = Collate(
        pairwise_cutoff=hyper.pairwise_cutoff,
        three_body_cutoff=hyper.three_body_cutoff,
        task_names=dataset.task_names,
    )
    with connect(folder / "structures.db") as db:
        for index in rows:
            db.write(as_atoms(dataset[index]))
    with db:  # or each row would open the file again, which takes as long as decoding the row

        def from_store() -> None:
            for part in parts:
                dataset.__getitems__(part)

        def one_by_one() -> None:
            for index in chosen:
                dataset[index]

        def from_ase_db() -> None:
            for index in chosen:
                _ask(db.get(rows[index]).toatoms())

        def unasked() -> None:
            for index in chosen:
                db.get(rows[index]).toatoms()

        def micro_batches() -> None:
            for part in parts:
                collate(dataset.__getitems__(part))

        for index, sample in zip(chosen, dataset.__getitems__(chosen), strict=True):
            check_same(sample, db.get(rows[index]).toatoms())
        ways = {
            "store": from_store,
            "store_one_by_one": one_by_one,
            "ase_db": from_ase_db,
            "ase_db_unasked": unasked,
            "micro_batches": micro_batches,
        }
        speeds = _by_turns(ways, options.turns, len(chosen))
    ratios = {
        f"{ours}_over_{theirs}": _spread(np.divide(speeds[ours], speeds[theirs]).tolist())
        for ours in ("store", "store_one_by_one")
        for theirs in ("ase_db", "ase_db_unasked")
    }
    return {"structures_per_s": {name: _spread(values) for name, values in speeds.items()}, **ratios}


def _by_turns(ways: dict[str, Callable[[], None]], turns: int, structures: int) -> dict[str, list[float]]:
    """Structures/s of each way in each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            ways[name]()
            speeds[name].append(structures / (time.perf_counter() - start))
    return speeds


def as_atoms(sample: Sample) -> Atoms:
    """With the labels that there are; stress as ASE has it, (6,) in Voigt's order."""
    structure, labels = sample.structure, sample.labels
    atoms = Atoms(numbers=structure.numbers, positions=structure.positions, cell=structure.cell, pbc=structure.pbc)
    stress = None if labels.stress is None else full_3x3_to_voigt_6_stress(labels.stress)
    atoms.calc = SinglePointCalculator(
        atoms, energy=labels.energy, forces=labels.forces, stress=stress, magmoms=labels.magmoms
    )
    return atoms


def _ask(atoms: Atoms) -> None:
    """For the labels, as code that trains does; the calculator compares its atoms with these each time."""
    for name, ask in (
        ("energy", atoms.get_potential_energy),
        ("forces", atoms.get_forces),
        ("stress", partial(atoms.get_stress, voigt=False)),
        ("magmoms", atoms.get_magnetic_moments),
    ):
        if atoms.calc.results.get(name) is not None:
            ask()


def check_same(sample: Sample, atoms: Atoms) -> None:
    """Raises ValueError unless both are the same structure with the same labels, to the last bit."""
    ours, theirs = (
        {
            **{name: value for name, value in one.calc.results.items() if value is not None},
            **one.arrays,
            "cell": one.cell.array,
            "pbc": one.pbc,
        }
        for one in (as_atoms(sample), atoms)
    )
    differing = {name for name in {*ours, *theirs} if not np.array_equal(ours.get(name), theirs.get(name))}
    if differing:
        raise ValueError(f"{sample.identifier}: store and ASE db differ in {', '.join(sorted(differing))}")


def _packing(dataset: StructureDataset, cost: np.ndarray) -> list[dict[str, Any]]:
    """Times of plans for all ranks, and how even they are, with and without a budget."""
    found = []
    largest = dataset.sizes.max(axis=0)
    tight = Budget(limits=tuple((3 * largest).tolist()), names=("atoms", "edges", "angles"))
    for batch_size in sorted({min(size, len(dataset)) for size in (1024, 2048, 4096)}):
        sampler = GlobalBatchSampler(len(dataset), global_batch_size=batch_size)
        for budget in (Budget(), tight):
            for same_count in (False, True):
                milliseconds, ratios, least = [], [], []
                for step in range(5):
                    indices = sampler.indices(step)
                    sizes, own = dataset.sizes[indices], cost[indices]
                    start = time.perf_counter()
                    plan = plan_micro_batches(sizes, num_ranks=_RANKS, budget=budget, cost=own, same_count=same_count)
                    milliseconds.append(1e6 * (time.perf_counter() - start) / len(indices))
                    loads = np.array([sum(own[part].sum() for part in parts) for parts in plan])
                    ratios.append(loads.max() / loads.mean())
                    least.append(max(1.0, own.max() / loads.mean()))
                found.append(
                    {
                        "batch_size": batch_size,
                        "limits": budget.limits,
                        "same_count": same_count,
                        "ms_per_1000_structures": _spread(milliseconds),
                        "largest_over_mean": max(ratios),
                        "at_least": max(least),
                    }
                )
    return found


def _waiting(options: argparse.Namespace, num_workers: int, folder: Path) -> dict[str, float]:
    """Share of a run's time in which it waited for its next batch, beginning apart."""
    output = folder / f"run_{num_workers}"
    data = DataConfig(
        train=options.data,
        valid_fraction=0.0,
        global_batch_size=options.batch_size,
        num_workers=num_workers,
        cache_dir=options.cache_dir,
    )
    interval = max(1, options.steps // 2)
    training = TrainingConfig(output=str(output), train_iters=options.steps, log_interval=interval)
    with contextlib.redirect_stdout(io.StringIO()):
        status = run_training(TrainConfig(data=data, training=training, model=PRESETS[options.preset]))
    if status != 0:  # SIGTERM, which training takes as a wish to stop after a step
        raise SystemExit(status)
    waited = [row["data_wait"] for row in read_csv(output / "log.csv") if "data_wait" in row]
    return {"first_half": waited[0], "second_half": waited[-1]}


def _memory(dataset: StructureDataset, copies: int, folder: Path) -> dict[str, float]:
    """Of a fresh process."""
    store = folder / f"copies_{copies}.h5"
    reader = dataset.stores[0]
    with StoreWriter(store, reader.fields) as writer:
        for _ in range(copies):
            writer.append_store(reader)
        writer.finish(reader.attributes)
    return measure_memory(store, folder / f"cache_{copies}")


def measure_memory(store: Path, cache: Path) -> dict[str, float]:
    """Of a process of its own that opens and reads a store which another one has opened before."""
    records = len(_opened(StoreReader(store), cache))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        opened, read = pool.apply(_measured, (store, cache))
    return {
        "records": records,
        "store_bytes": store.stat().st_size,
        "shared_bytes_per_record": sum(file.stat().st_size for file in cache.glob("*.rows")) / records,
        "opened_bytes": opened,
        "after_reading_bytes": read,
    }


def _opened(reader: StoreReader, cache: Path) -> StructureDataset:
    """With the counts that the store has."""
    cutoffs = {name: reader.attributes[name] for name in ("pairwise_cutoff", "three_body_cutoff")}
    return open_dataset([str(reader.path)], cache_dir=cache, **cutoffs)


def _measured(store: Path, cache: Path) -> tuple[int, int]:
    """Private bytes that opening and planning adds, and that reading adds beside."""
    warm = StoreReader(store)  # h5py's own
    warm[0]
    before = _private_bytes()
    dataset = _opened(warm, cache)
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=min(_RANKS, len(dataset)))
    loader = StepLoader(dataset, sampler, list, num_steps=_PLANS, world_size=_RANKS)
    for step in range(_PLANS):
        loader.plan(step)
    opened = _private_bytes()
    for index in np.random.default_rng(0).integers(0, len(dataset), _READS):
        dataset[int(index)]
    return opened - before, _private_bytes() - opened


def _private_bytes() -> int:
    """That are in no file: mapped pages of files count as private where no other process has them at the moment."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    sys.exit(run(main))
