"""Step records to every place where people look for them."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus.file_errors import naming
from janus.telemetry.csv_log import CsvLog


class RunLog:
    """`log.csv` and `tensorboard/` of a run directory, and a wandb project when asked.

    Args:
        directory: run directory.
        columns: names of all values that will ever be logged.
        start_step: step that the run continues from.
        wandb_project: project name, or None for no wandb.
        config: resolved settings, for wandb.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        directory: Path,
        columns: Sequence[str],
        *,
        start_step: int = 0,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        self._wandb = _start_wandb(wandb_project, directory, config) if wandb_project else None
        with naming(directory / "log.csv"):
            self._csv = CsvLog(directory / "log.csv", columns, start_step)
        self._tensorboard = SummaryWriter(directory / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record. `valid_x` appears as `valid/x` in TensorBoard, everything else as `train/x`.

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        with naming(self._directory / "log.csv"):
            self._csv.write(step, values)
        with naming(self._directory / "tensorboard"):
            for name, value in values.items():
                tag = name.replace("valid_", "valid/", 1) if name.startswith("valid_") else f"train/{name}"
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Raises OSError as `write` does."""
        with naming(self._directory / "log.csv"):
            self._csv.close()
        with naming(self._directory / "tensorboard"):
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb(project: str) -> None:
    """Refuses a wandb project where wandb is not installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging to wandb project {project!r} needs wandb, which is not installed: "
            "pip install 'janus-matris[wandb]', or leave the project out"
        )


def _start_wandb(project: str, directory: Path, config: Mapping[str, Any] | None) -> Any:
    """A wandb run whose identifier follows from the directory, so that a resumed run continues it."""
    require_wandb(project)
    import wandb

    identifier = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project, name=directory.name, id=identifier, dir=directory, resume="allow", config=dict(config or {})
    )
