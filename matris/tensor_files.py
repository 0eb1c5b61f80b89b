"""Safetensors files written and read tensor by tensor, one file or several with an index as Hugging Face has it.

No more than one tensor is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from janus.checkpoint.header import make_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
"""Weights larger than this are cut into several files."""
_BLOCK = 1 << 24


def write_weights(
    directory: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], *, max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, str]:
    """Writes `model.safetensors`, or several files and their index.

    Args:
        directory: exists.
        like: shapes and formats of the tensors by name; may be on the meta device.
        read: gives a tensor; called once for each name.
        max_file_bytes: above it there are several files, each with at most so many bytes of tensors or a single one.

    Returns:
        SHA-256 of each file, by its name.

    Raises:
        ValueError: a tensor is not as `like` says.
    """
    files = files_of(like, max_file_bytes)
    digests = {
        file: write_file(directory / file, {name: like[name] for name in names}, read) for file, names in files.items()
    }
    if len(files) > 1:
        write_index(directory, like, files)
        digests[INDEX] = sha256_of(directory / INDEX)
    return digests


def files_of(like: Mapping[str, Tensor], max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, list[str]]:
    """The tensors of each file, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, value in like.items():
        if groups[-1] and size + _bytes(value) > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(value)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_index(directory: Path, like: Mapping[str, Tensor], files: Mapping[str, list[str]]) -> None:
    """Writes which file has which tensor."""
    index = {
        "metadata": {"total_size": sum(map(_bytes, like.values()))},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def write_file(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> str:
    """Writes one safetensors file; arguments as of `write_weights`. Returns its SHA-256."""
    head, order = make_header(like)
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for block in _blocks(head, order, like, read):
            stream.write(block)
            digest.update(block)
    return digest.hexdigest()


def _blocks(
    head: bytes, order: Iterable[str], like: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    yield head
    for name in order:
        value = read(name).detach().cpu().contiguous()
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            raise ValueError(
                f"weight {name} is a {value.dtype} of shape {tuple(value.shape)}: it should be a "
                f"{like[name].dtype} of shape {tuple(like[name].shape)}"
            )
        content = value.flatten().view(torch.uint8).numpy().data
        del value
        yield from (content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """Tensors to read one by one.

    Attributes:
        directory: where the files lie.
        files: names of the tensors, by file.
    """

    directory: Path
    files: Mapping[str, tuple[str, ...]]

    @staticmethod
    def open(directory: Path) -> TensorFiles:
        """`model.safetensors` of a directory, or the files that its index names.

        Raises:
            ValueError: no weights, a damaged file or index, or files that are not what the index says.
        """
        if not (directory / INDEX).is_file():
            return TensorFiles(directory=directory, files={WEIGHTS: _names_in(directory / WEIGHTS)})
        found = {file: _names_in(directory / file) for file in sorted(set(read_index(directory).values()))}
        if {name: file for file, names in found.items() for name in names} != read_index(directory):
            raise ValueError(f"{directory / INDEX} does not fit the files that it names: copy the model again")
        return TensorFiles(directory=directory, files=found)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return {name for names in self.files.values() for name in names}

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        with self._opened(name) as file:
            return file.get_tensor(name)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Some of a tensor's first dimension; nothing else of it is read."""
        with self._opened(name) as file:
            part = file.get_slice(name)
            return torch.cat([part[index : index + 1] for index in indices.tolist()])

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        # Opened anew each time: what is mapped into memory of a file counts as this process's until it is closed.
        file = next(file for file, names in self.files.items() if name in names)
        with _open(self.directory / file) as stream:
            yield stream


def read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor, from the index.

    Raises:
        ValueError: it is damaged, or names files elsewhere.
    """
    path = directory / INDEX
    try:
        files = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise ValueError("it names files outside of its directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable index of weights: {error}") from error
    return files


def _names_in(path: Path) -> tuple[str, ...]:
    with _open(path) as stream:
        return tuple(stream.keys())


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the model is incomplete")
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        yield stream


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
