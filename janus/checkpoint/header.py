"""What a safetensors file begins with: the type, the shape and the place of each tensor in it.

The `safetensors` package writes a file from tensors that are all in memory, and in one go; whoever writes them one by
one, or beside other work, writes the header and then the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class HeaderEntry:
    """A tensor of a safetensors file.

    Attributes:
        dtype: torch's name of its type.
        shape: its shape.
        offset: where its bytes begin in the file.
    """

    dtype: str
    shape: list[int]
    offset: int


def make_header(like: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a file of such tensors, which may be on the meta device.

    Returns:
        The header, and where in the file each tensor begins, in the order in which they follow it without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The largest numbers first, as safetensors' own writer does: then all begin at multiples of their size.
    order = sorted(like, key=lambda name: (-like[name].element_size(), name))
    offset = 0
    for name in order:
        value = like[name]
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + header[name]["data_offsets"][0] for name in order}


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """What a safetensors file holds, by key.

    Raises:
        ValueError: it is none.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {
            key: HeaderEntry(
                dtype=_TYPES[entry["dtype"]],
                shape=list(entry["shape"]),
                offset=8 + length + int(entry["data_offsets"][0]),
            )
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: it has no header of a safetensors file") from error


_TYPES = {name: str(dtype).removeprefix("torch.") for dtype, name in _NAMES.items()}
