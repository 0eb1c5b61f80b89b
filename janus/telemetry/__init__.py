"""What a run says: records to CSV, TensorBoard and wandb, and a progress bar; rank 0 only."""

from janus.telemetry.csv_log import CsvLog
from janus.telemetry.progress import Progress
from janus.telemetry.records import RunLog, require_wandb

__all__ = ["CsvLog", "Progress", "RunLog", "require_wandb"]
