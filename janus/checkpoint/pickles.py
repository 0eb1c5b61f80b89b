"""Reading pickles of others: names on a list are looked up, anything else is refused, so that no code can run."""

from __future__ import annotations

import collections
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch

from janus.checkpoint.manifest import CheckpointError


class _Listed(pickle.Unpickler):
    """Knows the names that a subclass lists."""

    names: Mapping[tuple[str, str], Any]

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may use.

        Raises:
            UnpicklingError: it is not on the list.
        """
        if (module, name) in self.names:
            return self.names[module, name]
        if module.split(".")[0] in _SETTINGS_OF:
            return Ignored
        raise _RefusedError(f"{module}.{name}")


class _RefusedError(pickle.UnpicklingError):
    """A name that is not on the list."""


class Ignored:
    """Stands for an object of which nothing is needed: takes whatever made it, and forgets it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_SETTINGS_OF = ("argparse", "megatron", "signal")
"""Modules whose objects are settings in Megatron's files; they are ignored, and the modules not imported."""
PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    },
    **{("pathlib", name): PurePosixPath for name in ("PosixPath", "PurePosixPath")},
}
"""Names that cannot do harm. Never add a name here that calls what it is given."""
_TENSORS = {
    **PLAIN,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _Tensors(_Listed):
    """Tensors and plain values; where a tensor's numbers lie is torch's to say."""

    names = _TENSORS


class _TensorPickles(ModuleType):
    """What `torch.load` asks of a module for pickles."""

    Unpickler = _Tensors


def load_pickle(path: Path, names: Mapping[tuple[str, str], Any]) -> Any:
    """The content of a pickle that uses only these names.

    Args:
        names: by module and name; each is called with what the pickle says, and so must do no harm with anything.

    Raises:
        CheckpointError: it needs another name, or is no pickle; names the file, and nothing of it has run.
    """
    known = names

    class Known(_Listed):
        names = known

    try:
        with path.open("rb") as stream:
            return Known(stream).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it is a pickle that wants {error}, which a checkpoint does not need and which could "
            "run code"
        ) from None
    except Exception as error:  # a damaged pickle can end in any error
        raise CheckpointError(f"{path} is not a readable pickle ({type(error).__name__}: {error})") from error


def load_tensors(path: Path) -> Any:
    """What torch.save has written: tensors and plain values. Settings of Megatron's beside them are `Ignored`.

    Raises:
        CheckpointError: it holds more, or is damaged; names the file, and nothing of it has run.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # what torch wrote before 1.6 is no archive, and is not read
            programs = [name for name in archive.namelist() if name.endswith("constants.pkl")]
        if programs:
            raise _RefusedError("to be a program (TorchScript)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats, which nobody here can change
            # With torch's own list, `weights_only`, no checkpoint of Megatron-LM could be read: its settings are in it.
            return torch.load(path, map_location="cpu", pickle_module=_TensorPickles("pickles"), weights_only=False)
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it is a pickle that wants {error}, neither a tensor nor a plain value, and that could "
            "run code"
        ) from None
    except Exception as error:  # a damaged file can end in any error
        raise CheckpointError(f"{path} is not a readable torch file ({type(error).__name__}: {error})") from error
