"""Training checkpoints: safetensors and JSON, written atomically, verified by checksum, never a pickle."""

from janus.checkpoint.directory import CheckpointError, read_directory, verify_directory, write_directory
from janus.checkpoint.rng import capture_rng, restore_rng
from janus.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "capture_rng",
    "read_directory",
    "restore_rng",
    "verify_directory",
    "write_directory",
]
