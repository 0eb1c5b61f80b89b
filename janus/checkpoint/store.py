"""The checkpoints of one run: named by step, the newest valid one found by looking, old ones removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from janus.checkpoint.directory import TEMPORARY, CheckpointError, verify_directory, write_directory


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """Directory of checkpoints `step_00000100`, ...

    Attributes:
        directory: where they lie; made by the first save.
        keep_last: how many of the newest to keep.
    """

    directory: Path
    keep_last: int = 2

    def path(self, step: int) -> Path:
        """Directory of the checkpoint after `step` updates."""
        return self.directory / f"step_{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, best_step: int | None
    ) -> Path:
        """Writes a checkpoint; then removes all but the newest `keep_last` and that of `best_step`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        write_directory(path, tensors, state)
        for old in self.steps()[: -self.keep_last]:
            if old != best_step:
                shutil.rmtree(self.path(old))
        return path

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, valid or not."""
        if not self.directory.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in self.directory.iterdir())
        return sorted(int(name.group(1)) for name in names if name)

    def latest(self, say: Callable[[str], None]) -> Path | None:
        """Newest valid checkpoint, or None where there are none at all. Removes unfinished ones.

        A damaged one is passed over with a line to `say`.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        for unfinished in self.directory.glob(f"{TEMPORARY}*"):
            say(f"removing unfinished checkpoint {unfinished}")
            shutil.rmtree(unfinished)
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify_directory(self.path(step))
            except CheckpointError as error:
                say(f"{error}; falling back to the checkpoint before it")
            else:
                return self.path(step)
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.directory} is valid: "
                "choose another output directory, or remove them to start anew"
            )
        return None
