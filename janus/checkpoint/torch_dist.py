"""The format `torch_dist` of Megatron's `dist_checkpointing`: torch's distributed checkpoint, with two files beside it.

A directory with `__0_0.distcp`, ... and `.metadata`, which torch.distributed.checkpoint writes, `metadata.json`, which
names the format, and `common.pt` with what is no tensor. Pickles in it are read by lists of allowed names.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.filesystem as dcp_files
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from janus.checkpoint.manifest import CheckpointError
from janus.checkpoint.pickles import PLAIN, Ignored, load_pickle, load_tensors

FORMAT = "metadata.json"
COMMON = "common.pt"
METADATA = ".metadata"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _layout(name: str) -> torch.layout:
    """By the name that torch writes; tensors of no other kind are read here."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {name}")
    return torch.strided


_METADATA_NAMES = {
    **PLAIN,
    **{
        (each.__module__, each.__name__): each
        for each in (
            dcp_metadata.BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
            dcp_metadata._MEM_FORMAT_ENCODING,
            dcp_files._StorageInfo,
        )
    },
    ("torch.serialization", "_get_layout"): _layout,
    # Plans of the writer, which some versions of Megatron keep beside.
    ("torch.distributed.checkpoint.planner", "SavePlan"): Ignored,
    ("torch.distributed.checkpoint.planner", "WriteItem"): Ignored,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): Ignored,
    ("torch.distributed.checkpoint.planner", "TensorWriteData"): Ignored,
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"): Ignored,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
}


def write_torch_dist(
    path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], common: Mapping[str, Any]
) -> None:
    """Writes a directory that Megatron's `dist_checkpointing.load` reads, tensor by tensor, each in a file of its own.

    Args:
        path: does not exist yet.
        like: shapes and formats of the tensors by name; may be on the meta device.
        read: gives a tensor.
        common: plain values and tensors that are not sharded.

    Raises:
        FileExistsError: `path` exists.
        OSError, CheckpointError: it cannot be written; nothing is left behind.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another directory, or remove it first")
    path.mkdir(parents=True)
    try:
        # A file holds on to all of its tensors until it is written; so one each.
        writer = FileSystemWriter(path, single_file_per_rank=False, thread_count=1)
        dcp.save({}, storage_writer=writer, planner=_Planner(like, read), no_dist=True)
        torch.save(dict(common), path / COMMON)
        (path / FORMAT).write_text(json.dumps(_BACKEND))
    except CheckpointException as error:
        shutil.rmtree(path, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} could not be written: {type(reason).__name__}: {reason}") from None
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


class _Planner(SavePlanner):
    """Whole tensors, read when it is their turn."""

    def __init__(self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self._like, self._read = like, read

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, value in self._like.items():
            start = torch.Size([0] * value.ndim)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=start, sizes=value.shape),
                properties=TensorProperties(dtype=value.dtype),
                size=value.shape,
            )
            items.append(WriteItem(index=MetadataIndex(name, start), type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._read(write_item.index.fqn).detach().cpu().contiguous()


@dataclass(frozen=True, kw_only=True)
class TorchDist:
    """A directory to read from.

    Attributes:
        path: of the directory.
        like: shapes and formats of the tensors by name, on the meta device.
        common: what was stored beside them.
    """

    path: Path
    like: Mapping[str, Tensor]
    common: Mapping[str, Any]
    _stored: Mapping[str, TensorStorageMetadata] = field(repr=False)
    _places: Mapping[MetadataIndex, Any] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """A whole tensor, joined from its pieces.

        Raises:
            CheckpointError: a file is missing or damaged, or a piece lacks.
        """
        stored = self._stored[name]
        value = torch.empty(stored.size, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            piece = self._piece(MetadataIndex(name, chunk.offsets))
            if piece.shape != chunk.sizes or piece.dtype != value.dtype:
                raise CheckpointError(
                    f"{self.path / METADATA}: a piece of {name} is a {piece.dtype} of shape {tuple(piece.shape)}, and "
                    f"should be a {value.dtype} of shape {tuple(chunk.sizes)}"
                )
            value[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
            filled += piece.numel()
        if filled != value.numel():
            raise CheckpointError(f"{self.path}: {filled} of {value.numel()} elements of {name} are there")
        return value

    def _piece(self, index: MetadataIndex) -> Tensor:
        place = self._places.get(index)
        if place is None:
            raise CheckpointError(f"{self.path / METADATA} does not say where {index.fqn} lies")
        file = self.path / place.relative_path
        if Path(place.relative_path).name != place.relative_path or not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete")
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                found = torch.load(cast(Any, _Window(stream, place.offset, place.length)), weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{file} is refused: it is damaged, or holds more than a tensor") from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{file} is damaged: {index.fqn} cannot be read ({type(error).__name__})") from error
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{file} is damaged: {index.fqn} is a {type(found).__name__}")
        return found


class _Window:
    """A part of an open file, as a file; torch's own reader of such parts loads pickles of any kind."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self._stream, self._start, self._length = stream, start, length

    def read(self, size: int = -1) -> bytes:
        rest = max(self._length - self.tell(), 0)
        return self._stream.read(rest if size < 0 else min(size, rest))

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        return self._stream.readinto(view[: max(min(len(view), self._length - self.tell()), 0)])

    def readline(self) -> bytes:
        return self._stream.readline(max(self._length - self.tell(), 0))

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self.tell(), self._length)[whence]
        return self._stream.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        return self._stream.tell() - self._start


def open_torch_dist(path: Path) -> TorchDist:
    """A directory to read from.

    Raises:
        CheckpointError: it is not of this format, incomplete, damaged, or a pickle in it holds more than it may.
    """
    try:
        content = json.loads((path / FORMAT).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / FORMAT} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("sharded_backend") != "torch_dist":
        found = content.get("sharded_backend") if isinstance(content, dict) else content
        raise CheckpointError(f"{path / FORMAT} names the format {found!r}: only torch_dist is read")
    for name in (METADATA, COMMON):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: the checkpoint is incomplete")
    metadata, common = load_pickle(path / METADATA, _METADATA_NAMES), load_tensors(path / COMMON)
    if not isinstance(metadata, Metadata) or not isinstance(common, dict):
        raise CheckpointError(f"{path / METADATA} and {COMMON} do not describe a checkpoint")
    try:
        stored = {
            str(name): entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        like = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in stored.items()
        }
        places = {index: _checked(place) for index, place in metadata.storage_data.items()}
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path / METADATA} does not describe a checkpoint: {error}") from error
    return TorchDist(path=path, like=like, common=common, _stored=stored, _places=places)


def _checked(place: Any) -> Any:
    if getattr(place, "transform_descriptors", None):
        raise TypeError(f"files were transformed by {place.transform_descriptors}, which is not undone here")
    if not (isinstance(place.relative_path, str) and isinstance(place.offset, int) and isinstance(place.length, int)):
        raise TypeError(f"{place} is no place in a file")
    return place
