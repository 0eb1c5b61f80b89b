"""Files to one HDF5 store: parallel over processes, memory independent of the size, resumable, atomic.

Each block of frames becomes a small finished store, `OUTPUT.parts/000017.h5`; at the end they are joined. What a
killed run has finished is therefore whole, and the next run with the same inputs and options takes it as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from janus.data.exclusive import exclusive
from janus.data.parallel_map import map_in_order
from janus.data.store import VERSION, StoreReader, StoreWriter
from matris.data.frames import FrameBlock, expand_path, iter_blocks, read_block, refuse_idle_keys
from matris.data.labels import SEARCH_ORDER, LabelKeys
from matris.data.records import FIELDS, LABEL_NAMES, to_record
from matris.graph.build import count_graph
from matris.writable import check_writable

logger = logging.getLogger(__name__)

STORE_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What determines the content of a store, beside its inputs.

    Attributes:
        keys: where the labels are.
        wanted: labels of which at least one must be found; names of `Labels`.
        task: name of the level of theory; None keeps that of input stores ("default" for other files).
        pairwise_cutoff, three_body_cutoff: of the counts of edges and angles, Angstrom.
        split_key: info entry whose value is stored as the group of a frame, for splits that keep groups together.
    """

    keys: LabelKeys = field(default_factory=LabelKeys)
    wanted: tuple[str, ...] = ("energy", "forces")
    task: str | None = None
    pairwise_cutoff: float = 6.0
    three_body_cutoff: float = 4.5
    split_key: str | None = None

    def __post_init__(self) -> None:
        unknown = set(self.wanted) - set(LABEL_NAMES)
        if unknown:
            raise ValueError(f"unknown labels {sorted(unknown)}: allowed are {', '.join(LABEL_NAMES)}")
        if not 0.0 < self.three_body_cutoff <= self.pairwise_cutoff:
            raise ValueError(
                f"three_body_cutoff {self.three_body_cutoff} A must be positive and at most "
                f"pairwise_cutoff {self.pairwise_cutoff} A"
            )
        if self.task is not None and not self.task.strip():
            raise ValueError(f"task is {self.task!r}: give it a name, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was found.

    Attributes:
        num_frames: structures in the store.
        sources: per label, how many frames had it under which key.
        keys: every key that any frame has.
        tasks: names of levels of theory that the structures have, sorted.
        problems: frames left out, with the reason; empty unless `strict` was off.
    """

    num_frames: int
    sources: dict[str, dict[str, int]]
    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    problems: tuple[str, ...]

    @staticmethod
    def join(reports: Iterable[PrepareReport]) -> PrepareReport:
        """Of all parts together."""
        num_frames = 0
        keys: set[str] = set()
        tasks: set[str] = set()
        problems: list[str] = []
        counters = {name: Counter[str]() for name in LABEL_NAMES}
        for report in reports:
            num_frames += report.num_frames
            keys |= set(report.keys)
            tasks |= set(report.tasks)
            problems += report.problems
            for name, counts in report.sources.items():
                counters[name].update(counts)
        sources = {name: dict(counts) for name, counts in counters.items()}
        return PrepareReport(
            num_frames=num_frames,
            sources=sources,
            keys=tuple(sorted(keys)),
            tasks=tuple(sorted(tasks)),
            problems=tuple(problems),
        )

    @staticmethod
    def of_store(reader: StoreReader) -> PrepareReport:
        """The report that a store carries."""
        report = reader.attributes["report"]
        return PrepareReport(
            num_frames=report["num_frames"],
            sources=report["sources"],
            keys=tuple(report["keys"]),
            tasks=tuple(report["tasks"]),
            problems=tuple(report["problems"]),
        )


def prepare(
    paths: list[str],
    output: Path | str,
    options: PrepareOptions,
    *,
    num_workers: int = 0,
    progress: bool = False,
    strict: bool = True,
    wait: bool = False,
    option_prefix: str = "--",
) -> PrepareReport:
    """Write the structures and labels of `paths` to the store `output`.

    Args:
        num_workers: processes that parse and count; 0 works in this one.
        progress: show a bar.
        strict: raise at the first frame that cannot be used; otherwise leave it out and report it.
        wait: if another process prepares the same output, wait for it instead of refusing.
        option_prefix: of the command's options for keys, as messages name them.
    Raises:
        ValueError: unreadable files, invalid frames, a wanted label found nowhere, no frame at all, an output that
            was made from something else, that another process is making, or that could not be found as a store.
        OSError: a file that may not be read or written.
    """
    output = Path(output)
    if output.suffix.lower() not in STORE_SUFFIXES:
        raise ValueError(f"output {output}: must end in {' or '.join(STORE_SUFFIXES)}, by which a store is known")
    if output.is_dir():
        raise ValueError(f"output {output}: is a folder; give the name of a file, such as {output / 'data.h5'}")
    files = [file for path in paths for file in expand_path(path)]
    if not files:
        raise ValueError("no input files")
    for file in files:  # while nothing is written yet
        with open(file, "rb"):
            pass
    refuse_idle_keys(paths, options.keys)
    fingerprint = _fingerprint(files, options, strict)
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        with exclusive(output.with_name(output.name + ".parts"), wait=wait) as parts:
            if not output.exists():  # another process may have finished it while this one waited
                _prepare_parts(files, output, parts, options, fingerprint, num_workers, progress, strict, option_prefix)
            shutil.rmtree(parts)
    reader = StoreReader(output)
    if reader.attributes.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{output}: exists, and was prepared from other inputs or with other options; remove it or choose another "
            "output"
        )
    report = PrepareReport.of_store(reader)
    _log(report, options.keys)
    return report


def check_wanted(
    report: PrepareReport, wanted: Iterable[str], keys: LabelKeys, where: str, *, option_prefix: str = "--"
) -> None:
    """Fail when a wanted label, or one whose key was given, is in no frame.

    Args:
        option_prefix: of the command's options for keys.

    Raises:
        ValueError: names the label, where it was looked for, the keys that there are, and the option that names one.
    """
    explicit = {
        "energy": (keys.energy,),
        "forces": (keys.forces,),
        "stress": (keys.stress, keys.virials),
        "magmoms": (keys.magmoms,),
    }
    for name in LABEL_NAMES:
        given = [key for key in explicit[name] if key is not None]
        if report.sources.get(name) or not (given or name in wanted):
            continue
        raise ValueError(
            f"{where}: no frame has the label {name!r}, looked for under {', '.join(given or SEARCH_ORDER[name])}; "
            f"keys in the data: {', '.join(report.keys) or 'none'}. Give its key with {option_prefix}{name}_key, or "
            "do not ask for this label"
        )


def _prepare_parts(
    files: list[str],
    output: Path,
    parts: Path,
    options: PrepareOptions,
    fingerprint: str,
    num_workers: int,
    progress: bool,
    strict: bool,
    option_prefix: str,
) -> None:
    plan = parts / "plan.json"
    if not plan.exists() or json.loads(plan.read_text()) != fingerprint:
        for old in parts.iterdir():
            if old != plan:
                logger.info("%s: left by a run with other inputs or options; removed", old)
            old.unlink()
        plan.with_suffix(".new").write_text(json.dumps(fingerprint))
        os.replace(plan.with_suffix(".new"), plan)
    blocks = ((parts / f"{number:06d}.h5", block) for number, block in enumerate(iter_blocks(files)))
    total = sum(os.path.getsize(file) for file in files)
    num_parts, frames = 0, 0
    try:
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=output.name, disable=not progress, mininterval=0.5
        ) as bar:
            work = partial(_write_part, options=options, strict=strict)
            for num_frames, num_bytes in map_in_order(work, blocks, num_workers=num_workers):
                num_parts, frames = num_parts + 1, frames + num_frames
                bar.set_postfix(frames=frames, refresh=False)
                bar.update(num_bytes)
        readers = [StoreReader(parts / f"{number:06d}.h5") for number in range(num_parts)]
        report = PrepareReport.join(PrepareReport.of_store(reader) for reader in readers)
        where = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        if strict and not report.num_frames:
            raise ValueError(f"{where}: no structure at all; is the file empty?")
        if strict:
            check_wanted(report, options.wanted, options.keys, where, option_prefix=option_prefix)
    except ValueError:
        shutil.rmtree(parts)  # the user has to change something, and then nothing of this can be used
        raise
    with StoreWriter(output, FIELDS) as writer:
        for reader in readers:
            if len(reader):
                writer.append_store(reader)
        writer.finish(_attributes(options, fingerprint, report))


def _write_part(part: tuple[Path, FrameBlock], options: PrepareOptions, strict: bool) -> tuple[int, int]:
    """Write the store of one block unless it is there. Returns its frames, and the bytes of the file it stands for."""
    path, block = part
    if path.exists():
        return len(StoreReader(path)), block.num_bytes
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    keys: set[str] = set()
    tasks: set[str] = set()
    sources = {name: Counter[str]() for name in LABEL_NAMES}
    for frame in read_block(block, options.keys, options.task, options.split_key):
        try:
            if isinstance(frame, ValueError):
                raise frame
            try:
                size = count_graph(
                    frame.sample.structure,
                    pairwise_cutoff=options.pairwise_cutoff,
                    three_body_cutoff=options.three_body_cutoff,
                )
                records.append(to_record(frame.sample, size))
            except ValueError as error:
                raise ValueError(f"{frame.sample.identifier}: {error}") from None
        except ValueError as error:
            if strict:
                raise
            problems.append(str(error))
            continue
        keys |= frame.keys
        tasks.add(frame.sample.task)
        for name, source in frame.sources.items():
            sources[name][source] += 1
    report = PrepareReport(
        num_frames=len(records),
        sources={name: dict(counts) for name, counts in sources.items()},
        keys=tuple(sorted(keys)),
        tasks=tuple(sorted(tasks)),
        problems=tuple(problems),
    )
    with StoreWriter(path, FIELDS) as writer:
        writer.append(records)
        writer.finish({"report": asdict(report)})
    return len(records), block.num_bytes


def _attributes(options: PrepareOptions, fingerprint: str, report: PrepareReport) -> dict[str, Any]:
    return {
        "pairwise_cutoff": options.pairwise_cutoff,
        "three_body_cutoff": options.three_body_cutoff,
        "units": "eV, Angstrom, eV/A, eV/A^3 (tensile positive), Bohr magneton",
        "split_key": options.split_key,
        "fingerprint": fingerprint,
        "report": asdict(report),
    }


def _fingerprint(files: list[str], options: PrepareOptions, strict: bool) -> str:
    """Of inputs (path, size, time of change), options, and the format of stores."""
    stats = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, stats, asdict(options), strict]).encode()).hexdigest()


def _log(report: PrepareReport, keys: LabelKeys) -> None:
    logger.info("%d structures", report.num_frames)
    for name in LABEL_NAMES:
        counts = report.sources.get(name, {})
        found = ", ".join(f"{source}: {count}" for source, count in counts.items()) or "not found"
        unit = f" (read as {keys.stress_unit.value}, stored as eV/A^3)" if name == "stress" and counts else ""
        logger.info("  %-8s %s%s", name, found, unit)
