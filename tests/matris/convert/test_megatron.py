"""Models in Megatron's format: Megatron itself reads what we write, and we what it writes; bad pickles are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from janus.checkpoint import CheckpointError
from janus.checkpoint.torch_dist import open_torch_dist
from matris.cli import main
from matris.exported import load_model, save_model
from matris.model import MatRIS
from tests.matris.structures import EXPERTS, tiny_model

ROOT = Path(__file__).resolve().parents[3]


def job(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parent / "megatron_job.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(source: Path, output: Path, *words: str) -> int:
    return main(["convert", "--input", str(source), "--output", str(output), *words])


def same_weights(ours: MatRIS, theirs: MatRIS) -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.fixture(scope="module")
def model() -> MatRIS:
    model = tiny_model(EXPERTS, seed=7)
    model.elements = (8, 14)
    model.set_reference_energies({8: -4.0})
    return model


@pytest.fixture(scope="module")
def ours(model: MatRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of Megatron's format that we have written; copy it to change it."""
    folder = tmp_path_factory.mktemp("megatron")
    save_model(model, folder / "model", provenance={"made_by": "test"})
    assert convert(folder / "model", folder / "dist", "--to", "torch_dist") == 0
    return folder / "dist"


def test_comes_back_as_it_was(model: MatRIS, ours: Path, tmp_path: Path) -> None:
    assert convert(ours, tmp_path / "back") == 0
    back = load_model(tmp_path / "back")
    assert same_weights(back, model)
    assert back.elements == (8, 14)
    assert "test" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.slow
def test_megatron_reads_what_we_write(ours: Path) -> None:
    assert "loaded" in job("load", str(ours), str(ours.parent / "model"))


@pytest.mark.slow
def test_we_read_what_megatron_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "saved" in job("save", str(tmp_path / "iter_0000012"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")  # as Megatron-LM's directories have it
    assert convert(tmp_path, tmp_path / "unknown") == 2
    assert "does not say what its model is" in capsys.readouterr().err
    save_model(tiny_model(EXPERTS, seed=1), tmp_path / "like", provenance={})
    assert convert(tmp_path, tmp_path / "model", "--like", str(tmp_path / "like")) == 0
    assert same_weights(load_model(tmp_path / "model"), tiny_model(EXPERTS, seed=4))


def test_settings_of_megatron_are_no_obstacle(ours: Path, tmp_path: Path) -> None:
    from megatron.core.transformer.enums import AttnBackend

    shutil.copytree(ours, tmp_path / "iter_0000003")
    shutil.copytree(ours.parent / "model", tmp_path / "model")  # which says what the checkpoint is
    settings = Namespace(backend=AttnBackend.auto, signal=signal.SIGTERM, dtype=torch.bfloat16, save=Path("here"))
    content = {"args": settings, "iteration": 3, "lr": torch.ones(2), "opt_param_scheduler": OrderedDict(max_lr=0.1)}
    torch.save(content, tmp_path / "iter_0000003" / "common.pt")
    common = open_torch_dist(tmp_path / "iter_0000003").common
    assert common["iteration"] == 3
    assert torch.equal(common["lr"], torch.ones(2))
    assert not isinstance(common["args"], Namespace)
    assert convert(tmp_path / "iter_0000003", tmp_path / "out") == 0
    assert same_weights(load_model(tmp_path / "out"), load_model(tmp_path / "model"))


class Malicious:
    """Makes a directory when a loader that trusts it unpickles it."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.evidence),)


class Evaluated:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('os').mkdir('evidence')",)


class Restored:
    """Calls through a class that is on the list."""

    def __reduce__(self) -> tuple[object, tuple[object, tuple[str]]]:
        return torch.storage._load_from_bytes, (pickle.dumps(Evaluated()),)


@pytest.fixture
def copy(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ours, tmp_path / "dist")
    return tmp_path / "dist"


def replace_metadata(directory: Path, value: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(value))


def replace_common(directory: Path, value: object) -> None:
    torch.save({"iteration": 0, "extra": value}, directory / "common.pt")


def replace_tensor(directory: Path, value: object) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        torch.save(value, directory / place.relative_path)
        place.length = (directory / place.relative_path).stat().st_size
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "file"),
    [(replace_metadata, ".metadata"), (replace_common, "common.pt"), (replace_tensor, ".distcp")],
)
@pytest.mark.parametrize("kind", [Malicious, Evaluated, Restored])
def test_malicious_pickles_are_refused(
    copy: Path,
    tmp_path: Path,
    kind: type,
    change: Callable[[Path, object], None],
    file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evidence = tmp_path / "evidence"
    change(copy, kind(evidence) if kind is Malicious else kind())
    assert convert(copy, tmp_path / "out", "--no-verify") == 2
    error = capsys.readouterr().err
    assert file in error
    assert "refused" in error
    assert "weights_only" not in error
    assert not evidence.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"dist"}


def test_a_pickle_hidden_in_the_metadata_is_refused(copy: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data = {"deep": [Malicious(tmp_path / "evidence")]}
    replace_metadata(copy, metadata)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: .* wants (posix|nt)\.mkdir"):
        open_torch_dist(copy)
    assert not (tmp_path / "evidence").exists()


class Program(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_programs_are_refused(copy: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program()).save(str(copy / "common.pt"))
    with pytest.raises(CheckpointError, match=r"common\.pt is refused: .*TorchScript"):
        open_torch_dist(copy)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__0_3.distcp"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damage_is_named(
    copy: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / name)
    assert convert(copy, tmp_path / "out", "--no-verify") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert name in error or "nothing that is known" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [[], {"sharded_backend": "zarr"}, {"sharded_backend": None}])
def test_other_formats_are_refused(copy: Path, content: object) -> None:
    (copy / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="only torch_dist is read"):
        open_torch_dist(copy)


def test_files_elsewhere_are_not_read(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../dist/{place.relative_path}"
    replace_metadata(copy, metadata)
    content = open_torch_dist(copy)
    with pytest.raises(CheckpointError, match="is missing"):
        content.read("atom_embedding.table")


def test_weights_of_another_shape_are_named(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = torch.load(copy / "common.pt", weights_only=True)
    common["janus_matris"]["model"]["hidden_size"] = 32
    torch.save(common, copy / "common.pt")
    assert convert(copy, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "do not fit its hyper-parameters" in error
    assert "expected is" in error
