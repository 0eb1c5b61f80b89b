"""Every conversion verifies itself, holds few tensors at a time, and leaves nothing where it fails."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus.checkpoint import directory as checkpoint_directory
from janus.checkpoint import write_directory
from matris.cli import main
from matris.convert import run as conversion
from matris.convert.check import check_equal, small_crystal
from matris.convert.facts import export_facts
from matris.convert.kinds import Kind, recognise
from matris.convert.megatron import save_megatron
from matris.convert.training import save_training
from matris.convert.upcycle import Upcycling, upcycled
from matris.exported import StoredModel, load_model, open_model, save_model, write_model
from matris.graph.build import build_graph
from matris.pruning import pruned
from matris.reference_export import save_reference
from tests.matris.structures import EXPERTS, TINY, tiny_model

PLAIN = replace(TINY, smooth_attention=False)
TARGETS = {
    "reference": ["--to", "reference"],
    "checkpoint": ["--to", "checkpoint"],
    "torch_dist": ["--to", "torch_dist"],
    "moe": ["--to", "moe", "--experts", "3", "--topk", "2"],
}


def convert(source: Path, output: Path, *words: str) -> int:
    return main(["convert", "--input", str(source), "--output", str(output), *words])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model that every format can represent."""
    model = tiny_model(PLAIN)
    model.elements = (8, 14)
    save_model(model, tmp_path / "plain", provenance={})
    return tmp_path / "plain"


def in_state(source: Path, change: Callable[[dict[str, Tensor]], None]) -> StoredModel:
    """An opened model with other weights."""
    stored = open_model(source)
    state = {name: stored.read(name).clone() for name in stored.like}
    change(state)
    return replace(stored, read=state.__getitem__)


@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back(plain: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(plain, tmp_path / "other", *TARGETS[target]) == 0
    said = capsys.readouterr().out
    assert "energies, forces, stress, magnetic moments of 8 atoms are equal" in said
    assert f"written: {tmp_path / 'other'}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "other"}
    if target == "moe":
        assert load_model(tmp_path / "other").hyper.num_moe_experts == 3
        return
    assert convert(tmp_path / "other", tmp_path / "back") == 0
    back, model = (load_model(tmp_path / name).state_dict() for name in ("back", "plain"))
    assert back.keys() == model.keys()
    assert all(torch.equal(back[name], value) for name, value in model.items())


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_result_is_found(
    plain: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["blocks.0.atom_refinement.message.core.weight"][0, 0] += 1e-3

    name = {"reference": "save_reference", "checkpoint": "save_training", "torch_dist": "save_megatron"}.get(target)
    if name is None:
        good = conversion.upcycled
        monkeypatch.setattr(conversion, "upcycled", lambda stored, options: good(in_state(plain, spoil), options))
    else:
        writer = {"save_reference": save_reference, "save_training": save_training, "save_megatron": save_megatron}[
            name
        ]
        monkeypatch.setattr(conversion, name, lambda stored, path: writer(in_state(plain, spoil), path))
    assert convert(plain, tmp_path / "other", *TARGETS[target]) == 2
    assert "the result is another model: energies of 8 atoms differ by" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}
    assert convert(plain, tmp_path / "other", *TARGETS[target], "--no-verify") == 0


def test_weights_that_got_lost_are_found(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(stored: StoredModel, path: Path) -> None:
        save_megatron(
            replace(stored, like={name: v for name, v in stored.like.items() if "line_basis" not in name}), path
        )

    monkeypatch.setattr(conversion, "save_megatron", without)
    assert convert(plain, tmp_path / "other", "--to", "torch_dist", "--no-verify") == 2
    assert "line_basis.frequencies (it is missing" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_models_of_other_elements_cannot_be_compared(plain: Path) -> None:
    stored = open_model(plain)
    other = tiny_model(PLAIN)
    other.elements = (1,)
    state = other.state_dict()
    with pytest.raises(ValueError, match="no element in common"):
        check_equal(stored, StoredModel(model=other, like=state, read=state.__getitem__, provenance={}))


def test_the_crystal_has_angles_and_all_elements() -> None:
    crystal = small_crystal([8, 14, 26], 4.0)
    assert set(crystal.numbers.tolist()) == {8, 14, 26}
    graph = build_graph(crystal, pairwise_cutoff=5.0, three_body_cutoff=4.0)
    assert graph.num_edges > 8 * 12
    assert len(graph.angle_target_edge) > 100


class Counted:
    """Reads weights, and knows the most that were alive at a time: tensors, and their bytes."""

    def __init__(self, stored: StoredModel) -> None:
        self.read_one = stored.read
        self.alive = self.most = self.bytes = self.most_bytes = 0

    def __call__(self, name: str) -> Tensor:
        value = self.read_one(name).clone()
        self.alive, self.bytes = self.alive + 1, self.bytes + value.nbytes
        self.most, self.most_bytes = max(self.most, self.alive), max(self.most_bytes, self.bytes)
        weakref.finalize(value.untyped_storage(), self._gone, value.nbytes)
        return value

    def _gone(self, size: int) -> None:
        self.alive, self.bytes = self.alive - 1, self.bytes - size


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("target", ["model", "checkpoint", "torch_dist", "moe", "elements"])
def test_memory_does_not_grow_with_the_number_of_tensors(
    tmp_path: Path, target: str, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_directory, "_FILE_BYTES", 1)  # a file for each tensor, as if they were large
    model = tiny_model(replace(TINY if target == "moe" else EXPERTS, num_layers=num_layers))
    save_model(model, tmp_path / "model", provenance={})
    stored = open_model(tmp_path / "model")
    counted = Counted(stored)
    stored = replace(stored, read=counted)
    if target == "moe":
        write_model(upcycled(stored, Upcycling(num_experts=3, topk=2)), tmp_path / "out", max_file_bytes=1)
    elif target == "elements":
        few = pruned(stored, [14])
        counted.most = counted.most_bytes = 0  # the tables of routing are kept
        write_model(few, tmp_path / "out", max_file_bytes=1)
    else:
        write: dict[str, Callable[[StoredModel, Path], None]] = {
            "model": write_model,
            "checkpoint": save_training,
            "torch_dist": save_megatron,
        }
        write[target](stored, tmp_path / "out")
    tables = 2 * num_layers if target == "elements" else 0
    parts = 3 if target == "moe" else 1  # a layer of an expert is joined from three
    assert 0 < counted.most - tables <= 2 + parts, counted.most
    largest = max(value.nbytes for value in stored.like.values())
    assert counted.most_bytes <= (2 + parts) * largest + tables * EXPERTS.num_elements * EXPERTS.num_moe_experts * 8


@pytest.mark.parametrize("words", [[], *TARGETS.values()])
def test_nothing_is_replaced(plain: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    extra = [] if words else ["--from", "model"]
    assert convert(plain, tmp_path / "taken", *words, *extra) == 2
    assert "exists" in capsys.readouterr().err or not words
    assert (tmp_path / "taken").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert convert(plain, tmp_path / "file" / "x", *(words or TARGETS["checkpoint"])) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "taken", "file"}


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_cannot_be_written_to_the_end(
    plain: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as if the disk were full
    try:
        status = convert(plain, tmp_path / "out", *TARGETS[target])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert "File too large" in (error := capsys.readouterr().err), error
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_folders_that_were_made_for_a_failure_go(plain: Path, tmp_path: Path) -> None:
    smooth = tmp_path / "smooth"
    save_model(tiny_model(TINY), smooth, provenance={})
    assert convert(smooth, tmp_path / "new" / "deeper" / "out.pth.tar", "--to", "reference") == 2
    assert not (tmp_path / "new").exists()
    assert convert(plain, tmp_path / "new" / "deeper" / "out.pth.tar", "--to", "reference") == 0
    assert [path.name for path in (tmp_path / "new" / "deeper").iterdir()] == ["out.pth.tar"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--elements", "Si"], "no experts"),
        (["--elements", "Si,Xx"], "Xx"),
        (["--to", "moe", "--experts", "4", "--topk", "5"], "moe_router_topk is 5"),
        (["--to", "checkpoint", "--from", "checkpoint"], "is a model, and should be a checkpoint"),
        (["--to", "nothing"], "invalid choice"),
    ],
)
def test_mistakes_are_named(
    plain: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = convert(plain, tmp_path / "out", *words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_inputs_that_are_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints").mkdir()
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "model.safetensors", "give the directory"),
        (tmp_path, "nothing that is known"),
    ):
        with pytest.raises(ValueError, match=message):
            recognise(path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../12")
    with pytest.raises(ValueError, match="names the iteration"):
        recognise(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert recognise(tmp_path) == (Kind.torch_dist, tmp_path / "release")


@pytest.mark.parametrize("name", ["weights", "config", "missing"])
def test_damaged_models_are_refused(plain: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = plain / "model.safetensors"
    if name == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "missing":
        weights.unlink()
    else:
        (plain / "config.json").write_text("{")
    assert convert(plain, tmp_path / "out", "--to", "checkpoint") == 2
    error = capsys.readouterr().err
    assert ("config.json" if name == "config" else "model.safetensors") in error
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_checkpoints_that_do_not_say_what_they_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(PLAIN)
    path = tmp_path / "run" / "checkpoints" / "step_00000003"
    tensors = [
        (f"{kind}/{name}", value.clone()) for kind in ("model", "ema") for name, value in model.state_dict().items()
    ]
    state = json.loads(json.dumps({"step": 3, "settings": {"model": model.hyper.to_dict()}}))
    write_directory(path, tensors, state)  # as those of format 1 are, once they are read
    assert convert(tmp_path / "run", tmp_path / "out") == 2
    assert "does not say which elements its model knows" in capsys.readouterr().err
    model.elements = (14,)
    save_model(model, tmp_path / "run" / "last", provenance={})
    assert convert(tmp_path / "run", tmp_path / "out") == 0
    assert load_model(tmp_path / "out").elements == (14,)


def test_checkpoints_without_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(PLAIN)
    state = {"step": 3, "settings": {"model": model.hyper.to_dict()}, "export": export_facts(model)}
    tensors = [(f"model/{name}", value) for name, value in model.state_dict().items()]
    write_directory(tmp_path / "step_00000003", tensors, state)
    assert convert(tmp_path / "step_00000003", tmp_path / "out") == 2
    assert "has no averaged weights: give --weights raw" in capsys.readouterr().err
    assert convert(tmp_path / "step_00000003", tmp_path / "out", "--weights", "raw") == 0
    write_directory(tmp_path / "step_00000004", tensors[1:], state)
    assert convert(tmp_path / "step_00000004", tmp_path / "none", "--weights", "raw") == 2
    assert "1 differ, such as" in capsys.readouterr().err
