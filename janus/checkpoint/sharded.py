"""Writing a checkpoint from all ranks at once, each its part, through torch.distributed.checkpoint."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from janus.checkpoint.directory import begin, finish, staging_of, write_pieces
from janus.checkpoint.manifest import CheckpointError, Manifest, StoredFile, StoredPiece, StoredTensor
from janus.checkpoint.shards import Piece, Shards

# A run of one process is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_ALL = "shards"
"""The one entry of the state dict that is given to torch, which logs each of them."""


def write_shards(
    path: Path, shards: Mapping[str, Shards], state: Mapping[str, Any], *, group: ProcessGroup | None, rank: int
) -> None:
    """Writes a checkpoint; all ranks call it with their blocks, which together cover each tensor without overlap.

    Args:
        path: does not exist yet; appears when all ranks have written. On a file system that all ranks see.
        shards: by logical name, in the host's memory.
        state: JSON-ready values; those of rank 0 count.
        group: of all ranks, on the host; None for a run of one.
        rank: among them.

    Raises:
        CheckpointError: a rank could not write; on all ranks, with the reason. Nothing is left behind.
    """
    storage = _Storage(path, state, rank)
    try:
        dcp.save({_ALL: shards}, storage_writer=storage, planner=_Planner(), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        if rank == 0:
            shutil.rmtree(staging_of(path), ignore_errors=True)
        first = min(error.failures)
        reason = error.failures[first][0]
        raise CheckpointError(
            f"checkpoint {path} could not be written, {type(reason).__name__} on rank {first}: {reason}. Checkpoints "
            "that were there are as they were"
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank says about a block."""

    file: StoredFile
    piece: StoredPiece


class _Planner(SavePlanner):
    """Plans what `Shards` say: nothing is left to decide."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._items, self._pieces = [], {}
        for name, held in state_dict[_ALL].items():
            for piece in held.pieces:
                index = MetadataIndex(name, piece.start)
                properties = TensorProperties(dtype=piece.values.dtype)
                data = TensorWriteData(chunk=piece.chunk, properties=properties, size=held.shape)
                self._items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
                self._pieces[index] = piece

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._pieces[write_item.index]


class _Storage(StorageWriter):
    """One safetensors file per rank in the staging directory; rank 0 makes it a checkpoint at the end."""

    def __init__(self, path: Path, state: Mapping[str, Any], rank: int) -> None:
        self._path, self._state, self._name = path, state, f"rank_{rank:05d}.safetensors"

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        if is_coordinator:
            begin(self._path)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        staging = staging_of(self._path)
        if not staging.is_dir():
            raise CheckpointError(
                f"{staging}, which rank 0 made, is not here: all ranks must see the same directory, so choose one on a "
                "shared file system"
            )
        results: Future[list[WriteResult]] = Future()
        written: list[WriteResult] = []
        if plan.items:
            pieces = [(item.index.fqn, cast(Piece, planner.resolve_data(item))) for item in plan.items]
            file, stored = write_pieces(staging / self._name, pieces)
            for item, (_, piece), place in zip(plan.items, pieces, stored, strict=True):
                told = _Written(file=file, piece=place)
                written.append(WriteResult(index=item.index, size_in_bytes=piece.values.nbytes, storage_data=told))
        results.set_result(written)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written: dict[MetadataIndex, _Written] = {
            result.index: result.storage_data for of_rank in results for result in of_rank
        }
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            pieces = tuple(written[MetadataIndex(name, chunk.offsets)].piece for chunk in stored.chunks)
            tensors[name] = StoredTensor(dtype=stored.properties.dtype, shape=stored.size, pieces=pieces)
        files = {entry.piece.file: entry.file for entry in written.values()}
        finish(self._path, Manifest(files=files, tensors=tensors), self._state)

    # Of the interface, and not called by a save ----------------------------------------------------------------------

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> NoReturn:
        raise NotImplementedError("the path is an argument of write_shards")
