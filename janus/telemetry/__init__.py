"""What a run says, on rank 0 only: records to CSV, TensorBoard and wandb, a progress bar; and what tells its speed."""

from janus.telemetry.csv_log import CsvLog
from janus.telemetry.peak import Peak, find_peak
from janus.telemetry.progress import Progress
from janus.telemetry.records import RunLog, require_wandb
from janus.telemetry.stopwatch import Stopwatch

__all__ = ["CsvLog", "Peak", "Progress", "RunLog", "Stopwatch", "find_peak", "require_wandb"]
