"""The checkpoints of one run: named by step, written while the training goes on, old ones removed."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from janus.checkpoint.directory import DELETING, WRITING, Checkpoint, open_checkpoint, remove
from janus.checkpoint.manifest import CheckpointError, DamageError
from janus.checkpoint.sharded import write_shards
from janus.checkpoint.shards import Piece, Shards
from janus.comm.collectives import gather_objects, on_main_rank
from janus.mesh import Mesh

T = TypeVar("T")


class CheckpointStore:
    """Directory of checkpoints `step_00000100`, ... All ranks call `save`, `wait` and `latest`.

    Args:
        directory: where they lie, seen by all ranks; made by the first save.
        mesh: the ranks.
        keep_last: how many of the newest to keep.
        keep_every: keeps those of all multiples of so many steps besides; 0 for none.
        background: whether a save returns as soon as its tensors are copied to the host's memory.
    """

    def __init__(
        self,
        directory: Path,
        mesh: Mesh = Mesh(),  # noqa: B008 - frozen
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        background: bool = True,
    ) -> None:
        self.directory = directory
        self.mesh = mesh
        self.keep_last, self.keep_every = keep_last, keep_every
        self.background = background
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._group: ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def path(self, step: int) -> Path:
        """Directory of the checkpoint after `step` updates."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, valid or not."""
        if not self.directory.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in self.directory.iterdir())
        return sorted(int(name.group(1)) for name in names if name)

    # Writing ---------------------------------------------------------------------------------------------------------

    def save(self, step: int, shards: Mapping[str, Shards], state: Mapping[str, Any], *, best_step: int | None) -> None:
        """Starts to write a checkpoint, to be waited for. Once it is there, those that need not be kept are removed.

        Waits for the save before it, and copies what this rank writes; the copy's memory is kept for the next save.

        Args:
            shards: this rank's blocks; together those of all ranks cover each tensor without overlap.
            state: JSON-ready; that of rank 0 counts.
            best_step: is kept.

        Raises:
            CheckpointError: the save before it, or without `background` this one, failed.
        """
        self.wait()
        if self._group is None and self.mesh.world_size > 1:
            # Its own group: collectives of this thread and of the training's must not meet in one.
            self._group = dist.new_group(backend="gloo", group_desc="janus_checkpoint")
        copies = {name: self._copied(name, held.cut()) for name, held in shards.items()}
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, dict(state), best_step), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until the last save has ended.

        Raises:
            CheckpointError: it failed; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the last save has failed already; `wait` says why."""
        return self._failure is not None

    def _copied(self, name: str, held: Shards) -> Shards:
        """The same blocks in the host's memory."""
        pieces = []
        for piece in held.pieces:
            copy = self._copies.get((name, piece.start))
            if copy is None or copy.shape != piece.values.shape:
                copy = torch.empty(
                    piece.values.shape, dtype=piece.values.dtype, pin_memory=piece.values.device.type == "cuda"
                )
                self._copies[name, piece.start] = copy
            pieces.append(Piece(start=piece.start, values=copy.copy_(piece.values, non_blocking=True)))
        return Shards(shape=held.shape, pieces=tuple(pieces))

    def _write(self, step: int, copies: Mapping[str, Shards], state: Mapping[str, Any], best_step: int | None) -> None:
        try:
            write_shards(self.path(step), copies, state, group=self._group, rank=self.mesh.rank)
            if self.mesh.is_main:
                self._remove_old(best_step)
        except BaseException as error:
            self._failure = error

    def _remove_old(self, best_step: int | None) -> None:
        """Removes what need not be kept, now that there is a newer one."""
        for step in self.steps()[: -self.keep_last]:
            kept = self.keep_every > 0 and step % self.keep_every == 0
            if not kept and step != best_step:
                remove(self.path(step))

    # Finding ---------------------------------------------------------------------------------------------------------

    def latest(self, say: Callable[[str], None], use: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Uses the newest checkpoint that is whole, and returns it; None where there are none at all.

        Unfinished ones are removed. A damaged one is passed over, with a line to `say`, and set aside under another
        name.

        Args:
            use: reads it, and maybe finds damage.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged; one is of a newer format, or must not be read;
                or that of `use`.
        """
        on_main_rank(lambda: self._tidy(say), self.mesh)
        steps = on_main_rank(self.steps, self.mesh)
        faults: dict[Path, str] = {}
        for path in map(self.path, reversed(steps)):
            try:
                checkpoint = self.open(path)
                self.together(partial(use, checkpoint))
            except DamageError as error:
                faults[path] = str(error)
            else:
                on_main_rank(partial(self._set_aside, faults, path, say), self.mesh)
                return checkpoint
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.directory} is valid: choose another output directory, "
                f"or remove them to start anew. {'; '.join(faults.values())}"
            )
        return None

    def open(self, path: Path) -> Checkpoint:
        """A checkpoint to read from.

        Raises:
            CheckpointError: it is of a newer format, or must not be read; on all ranks.
            DamageError: it is damaged, or none; on all ranks.
        """
        return self.together(lambda: open_checkpoint(path))

    def together(self, read: Callable[[], T]) -> T:
        """Reads something on all ranks.

        Raises:
            CheckpointError: on all ranks, if one raises it; `DamageError` if it is no worse.
        """
        result, fault = None, None
        try:
            result = read()
        except CheckpointError as error:
            fault = isinstance(error, DamageError), str(error)
        faults = [found for found in gather_objects(fault, self.mesh) if found is not None]
        if faults:
            damaged, text = min(faults)
            raise DamageError(text) if damaged else CheckpointError(text)
        return cast(T, result)

    def _tidy(self, say: Callable[[str], None]) -> None:
        for prefix, what in ((WRITING, "unfinished"), (DELETING, "half removed")):
            for rest in self.directory.glob(f"{prefix}*"):
                say(f"removing {what} checkpoint {rest}")
                shutil.rmtree(rest)

    def _set_aside(self, faults: Mapping[Path, str], valid: Path, say: Callable[[str], None]) -> None:
        """Renames damaged checkpoints, for their steps will be reached again."""
        for path, fault in faults.items():
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"{fault}; moved to {aside}, falling back to {valid}")
