"""Training checkpoints: safetensors and JSON, written by all ranks at once, atomically, with checksums; no pickle."""

from janus.checkpoint.directory import (
    Checkpoint,
    open_checkpoint,
    read_directory,
    verify_directory,
    write_directory,
)
from janus.checkpoint.manifest import CheckpointError, DamageError
from janus.checkpoint.rng import capture_rng, restore_rng
from janus.checkpoint.store import CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "DamageError",
    "capture_rng",
    "open_checkpoint",
    "read_directory",
    "restore_rng",
    "verify_directory",
    "write_directory",
]
