"""Reading pickles of others: names on a list are looked up, anything else is refused, so that no code can run."""

from __future__ import annotations

import collections
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from janus.checkpoint.manifest import CheckpointError


class _Listed(pickle.Unpickler):
    """Knows only the names that it was given."""

    def __init__(self, file: Any, names: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may use.

        Raises:
            UnpicklingError: it is not on the list.
        """
        try:
            return self._names[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"the persistent object {str(pid)[:80]}")


class _RefusedError(pickle.UnpicklingError):
    """A name that is not on the list."""


PLAIN = {("collections", "OrderedDict"): collections.OrderedDict, ("builtins", "set"): set}
"""Names that cannot do harm. Never add a name here that calls what it is given."""


def load_pickle(path: Path, names: Mapping[tuple[str, str], Any]) -> Any:
    """The content of a pickle that uses only these names.

    Args:
        names: by module and name; each is called with what the pickle says, and so must do no harm with anything.

    Raises:
        CheckpointError: it needs another name, or is no pickle; names the file, and nothing of it has run.
    """
    try:
        with path.open("rb") as stream:
            return _Listed(stream, names).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it is a pickle that wants {error}, which a checkpoint does not need and which could "
            "run code"
        ) from None
    except Exception as error:  # a damaged pickle can end in any error
        raise CheckpointError(f"{path} is not a readable pickle ({type(error).__name__}: {error})") from error


def load_tensors(path: Path) -> Any:
    """What torch.save has written, tensors and plain values alone.

    Raises:
        CheckpointError: it holds more, or is damaged; names the file, and nothing of it has run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats, which nobody here can change
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's message is not repeated: it advises to load the file with `weights_only=False`.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values, and loading it could run "
            "code"
        ) from error
    except Exception as error:  # a damaged file can end in any error
        raise CheckpointError(f"{path} is not a readable torch file ({type(error).__name__}: {error})") from error
