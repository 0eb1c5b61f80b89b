"""One CSV file per run that stays consistent over kills and resumes."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path


class CsvLog:
    """Rows of numbers by step. Missing and NaN values are empty cells.

    Opening an existing file keeps the rows up to `start_step`: later ones belong to steps that are done again.

    Args:
        path: the file.
        columns: names of the values, without `step`.
        start_step: step that the run continues from; 0 for a new run, which starts the file anew.
    """

    def __init__(self, path: Path, columns: Sequence[str], start_step: int = 0) -> None:
        header = ["step", *columns]
        rows = [row for row in read_csv(path) if row["step"] <= start_step] if start_step and path.exists() else []
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            writer.writerows([_cell(row.get(name)) for name in header] for row in rows)
        temporary.replace(path)
        self._stream = path.open("a", newline="")
        self._header = header

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row and hands it to the operating system at once."""
        row = {"step": step, **values}
        unknown = set(row) - set(self._header)
        assert not unknown, f"columns {unknown} are not in the header"
        csv.writer(self._stream).writerow(_cell(row.get(name)) for name in self._header)
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_csv(path: Path) -> list[dict[str, float]]:
    """Rows of a log; empty cells are left out. A last line that a kill cut short is dropped."""
    with path.open(newline="") as stream:
        lines = stream.read().split("\n")
    # Whole rows end in a newline, so what follows the last one is unfinished.
    reader = csv.DictReader(lines[:-1])
    return [{name: float(cell) for name, cell in row.items() if cell} for row in reader]


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
