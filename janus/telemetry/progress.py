"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque

from tqdm import tqdm


class Progress:
    """How far the run is, how fast, and when it ends.

    Args:
        num_steps: steps of the whole run.
        start_step: step that the run continues from.
        line_interval: steps between plain lines where standard error is no terminal.
        active: whether to print at all (rank 0).
    """

    def __init__(self, num_steps: int, start_step: int = 0, *, line_interval: int = 1, active: bool = True) -> None:
        self._num_steps = num_steps
        self._line_interval = line_interval
        self._active = active
        # Rates over the last steps, not since the start.
        self._marks: deque[tuple[float, int, int, int]] = deque([(time.monotonic(), start_step, 0, 0)], maxlen=50)
        self._is_first = True
        shows_bar = active and sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True) if shows_bar else None

    def step(self, step: int, records: int, edges: int, text: str) -> tuple[float, float]:
        """After update number `step`, which took `records` records with `edges` edges. Returns both per second."""
        _, _, records_before, edges_before = self._marks[-1]
        now = time.monotonic()
        self._marks.append((now, step, records_before + records, edges_before + edges))
        begin, first_step, first_records, first_edges = self._marks[0]
        elapsed = max(now - begin, 1e-9)
        rates = (records_before + records - first_records) / elapsed, (edges_before + edges - first_edges) / elapsed
        if self._is_first:  # it makes kernels and fills caches, and says nothing of the steps to come
            self._is_first = False
            self.pause()
        if not self._active:
            return rates
        text = f"{text}  {rates[0]:.3g} structures/s  {rates[1]:.3g} edges/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif step % self._line_interval == 0 or step == self._num_steps:
            remaining = (self._num_steps - step) * elapsed / max(step - first_step, 1)
            print(f"step {step}/{self._num_steps}  {text}  ETA {tqdm.format_interval(remaining)}", flush=True)
        return rates

    def pause(self) -> None:
        """Call after work that is no step (evaluation, saving), so that it does not count as a slow step: rates begin
        anew."""
        _, step, records, edges = self._marks[-1]
        self._marks.clear()
        self._marks.append((time.monotonic(), step, records, edges))

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
