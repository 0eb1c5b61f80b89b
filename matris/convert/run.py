"""One conversion from its options to its files: open, change, write beside, verify, rename."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matris.convert.check import check_equal
from matris.convert.kinds import Kind, Target, recognise
from matris.convert.megatron import open_megatron, save_megatron
from matris.convert.training import open_training, save_training
from matris.convert.upcycle import Upcycling, upcycled
from matris.elements import SYMBOLS
from matris.exported import CONFIG, StoredModel, open_model, write_model
from matris.pruning import pruned
from matris.reference import open_reference
from matris.reference_export import save_reference
from matris.tensor_files import MAX_FILE_BYTES


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is converted into what.

    Attributes:
        input: a model directory, training checkpoint or run, reference checkpoint, or Megatron checkpoint.
        output: does not exist.
        target: what to make.
        kind: what `input` must be; None for whatever it is.
        elements: atomic numbers; of a model with experts only those that serve these are kept. None for all.
        averaged: of a training checkpoint, the averaged weights and not the raw ones.
        weights_chosen: whether the user said so; refused where there is no choice.
        experts: for the target `moe`.
        like: a model directory that says what a Megatron checkpoint is that does not say so itself.
        verify: compare predictions of source and result.
        max_file_bytes: larger models are cut into several files.
    """

    input: Path
    output: Path
    target: Target
    kind: Kind | None = None
    elements: Sequence[int] | None = None
    averaged: bool = True
    weights_chosen: bool = False
    experts: Upcycling | None = None
    like: Path | None = None
    verify: bool = True
    max_file_bytes: int = MAX_FILE_BYTES


def convert(conversion: Conversion) -> list[str]:
    """Converts; the output appears when it is whole and verified, or not at all.

    Returns:
        What was done, line by line, for the user.

    Raises:
        ValueError, OSError: the input cannot be read, represented or found again in the output.
    """
    kind, path = recognise(conversion.input)
    if conversion.kind is not None and kind is not conversion.kind:
        raise ValueError(f"{conversion.input} is a {kind.value}, and should be a {conversion.kind.value}")
    _refuse_idle(kind, conversion)
    with _staged(conversion.output) as staging:
        source = _open(kind, path, conversion)
        wanted, lines = _changed(source, conversion)
        _write(wanted, staging, conversion)
        # Of other formats the result is opened as anybody would: names, shapes and checksums are compared.
        result = _open(
            Kind.model if conversion.target is Target.moe else Kind(conversion.target.value), staging, conversion
        )
        _check_weights(wanted, result)
        if conversion.verify:
            lines.append(check_equal(source, result))
    return [f"{kind.value} {path}", *lines]


def _refuse_idle(kind: Kind, conversion: Conversion) -> None:
    """Options without an effect, and conversions that only copy."""
    if conversion.weights_chosen and kind is not Kind.checkpoint:
        raise ValueError(f"--weights belongs to a training checkpoint, and {conversion.input} is a {kind.value}")
    if conversion.like is not None and kind is not Kind.torch_dist:
        raise ValueError(f"--like belongs to a Megatron checkpoint, and {conversion.input} is a {kind.value}")
    if kind.value == conversion.target.value and conversion.elements is None and kind is not Kind.checkpoint:
        raise ValueError(
            f"{conversion.input} is a {kind.value} already: say with --to what to make of it, or with --elements which "
            "experts to keep"
        )


def _open(kind: Kind, path: Path, conversion: Conversion) -> StoredModel:
    if kind is Kind.model:
        return open_model(path)
    if kind is Kind.reference:
        return open_reference(path)
    if kind is Kind.checkpoint:
        return open_training(path, averaged=conversion.averaged)
    like = conversion.like
    if like is None and (path.parent / "model" / CONFIG).is_file():
        like = path.parent / "model"  # our jobs in Megatron-LM's loop describe their model there
    return open_megatron(path, None if like is None else open_model(like))


def _changed(source: StoredModel, conversion: Conversion) -> tuple[StoredModel, list[str]]:
    """What is to be written, and lines about it."""
    wanted, lines = source, []
    if conversion.elements is not None:
        wanted = pruned(wanted, conversion.elements)
        names = ", ".join(SYMBOLS[number] for number in wanted.model.elements)
        lines.append(
            f"{wanted.model.hyper.num_moe_experts} of {source.model.hyper.num_moe_experts} experts at each site, for "
            f"{names}"
        )
    if conversion.target is Target.moe:
        assert conversion.experts is not None, "the verb asks for it"
        wanted = upcycled(wanted, conversion.experts)
        lines.append(f"{conversion.experts.num_experts} experts at each of {2 * wanted.model.hyper.num_layers} sites")
    return wanted, lines


def _write(wanted: StoredModel, path: Path, conversion: Conversion) -> None:
    if conversion.target in (Target.model, Target.moe):
        write_model(wanted, path, max_file_bytes=conversion.max_file_bytes)
    elif conversion.target is Target.reference:
        save_reference(wanted, path)
    elif conversion.target is Target.checkpoint:
        save_training(wanted, path)
    else:
        save_megatron(wanted, path)


def _check_weights(wanted: StoredModel, result: StoredModel) -> None:
    found, expected = ({name: (v.shape, v.dtype) for name, v in each.like.items()} for each in (result, wanted))
    if found != expected:
        names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise ValueError(f"the result lacks weights, or has others: {names[:5]}; nothing was written")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A path beside the output that becomes it when the block ends well, and is gone otherwise."""
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists: choose another output, or remove it first")
    made = [folder for folder in (output.absolute().parent, *output.absolute().parents) if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield staging / output.name
        (staging / output.name).rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    shutil.rmtree(staging)
