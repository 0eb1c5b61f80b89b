"""Which Megatron-LM is accepted, which of its options are refused, and what our settings become there."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron
import numpy as np
import pytest
import yaml

from janus.data.packing import Budget
from matris import megatron as ours
from matris.megatron import CountedLoader, WholeSet, find_loop
from matris.megatron_options import REFUSALS, add_options, check_arguments, run_settings
from tests.matris.megatron_arguments import megatron_parser, parse_megatron


def known(
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    process_non_loss_data_func: Any = None,
    extra_args_provider: Any = None,
    args_defaults: Any = None,
    **others: Any,
) -> None:
    """The loop that the providers were written for."""


def with_others(
    train_valid_test_dataset_provider: Any, model_provider: Any, model_type: Any, step: Any, parser: Any
) -> None:
    """Other names."""


def with_one_more(
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    tokens: Any,
    extra_args_provider: Any = None,
) -> None:
    """Asks for something that nobody gives."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a `megatron.training` in place."""

    def put(pretrain: Any, *, version: str = "0.16.1", **names: Any) -> None:
        training = types.ModuleType("megatron.training")
        vars(training).update({"pretrain": pretrain, "get_args": SimpleNamespace, **names})
        monkeypatch.setitem(sys.modules, "megatron.training", training)
        monkeypatch.setattr(megatron, "training", training, raising=False)
        monkeypatch.setattr("megatron.core.__version__", version)

    return put


@pytest.mark.parametrize("version", ["0.16.0", "0.16.1", "0.17.1"])
def test_a_known_loop_is_found(install: Callable[..., None], version: str) -> None:
    install(known, version=version)
    loop = find_loop()
    assert loop.start.func is known  # type: ignore[attr-defined]
    assert loop.model_type.name == "encoder_or_decoder"


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "0.160.0", "1.0.0"])
def test_an_unknown_version_is_refused(install: Callable[..., None], version: str) -> None:
    install(known, version=version)
    with pytest.raises(
        ValueError, match=rf"version {version}, whose training loop is not known: use .*0\.16, 0\.17, 0\.18, 0\.19"
    ):
        find_loop()


def test_a_container_of_arguments_is_filled(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def pretrain(
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
    ) -> None:
        given.update(locals())

    install(pretrain, version="0.19.0")
    parsing, containing = types.ModuleType("parsing"), types.ModuleType("containing")
    vars(parsing)["parse_and_validate_args"] = lambda extra_args_provider: ("parsed", extra_args_provider)
    vars(containing)["pretrain_cfg_container_from_args"] = lambda arguments: ("contained", *arguments)
    monkeypatch.setitem(sys.modules, "megatron.training.arguments", parsing)
    monkeypatch.setitem(sys.modules, "megatron.training.argument_utils", containing)
    find_loop().start(train_valid_test_dataset_provider=1, model_provider=2, model_type=3, forward_step_func=4)
    assert given["cfg_container"] == ("contained", "parsed", add_options)
    assert given["model_provider"] == 2
    del vars(containing)["pretrain_cfg_container_from_args"]
    with pytest.raises(ValueError, match="has no parse_and_validate_args and pretrain_cfg_container_from_args"):
        find_loop()


def test_a_changed_signature_is_refused(install: Callable[..., None]) -> None:
    install(with_others)
    with pytest.raises(ValueError, match="lacks forward_step_func, extra_args_provider and asks for step, parser; its"):
        find_loop()
    install(with_one_more)
    with pytest.raises(ValueError, match=r"pretrain of version 0\.16\.1 asks for tokens"):
        find_loop()


def test_a_loop_without_its_functions_is_refused(install: Callable[..., None]) -> None:
    install(None)
    with pytest.raises(ValueError, match="has no pretrain and get_args"):
        find_loop()


def test_a_missing_loop_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    assert ours.main() == 2
    said = capsys.readouterr().err
    assert "megatron.training is not installed" in said
    assert "PYTHONPATH" in said


def test_a_missing_need_of_the_loop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("import a_package_that_nobody_has")
    monkeypatch.setattr(megatron, "__path__", [*megatron.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "megatron.training", raising=False)
    with pytest.raises(ValueError, match=r"megatron\.training needs the module a_package_that_nobody_has"):
        find_loop()


def run_of(install: Callable[..., None], done: int, end: BaseException | None = None, **names: Any) -> int:
    """Exit status of a run of 9 iterations with 4 structures each."""

    def pretrain(
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        extra_args_provider: Any,
    ) -> None:
        assert train_valid_test_dataset_provider.is_distributed
        if end is not None:
            raise end

    arguments = SimpleNamespace(
        consumed_train_samples=4 * done, global_batch_size=4, train_iters=9, **{"skip_train": False, **names}
    )
    install(pretrain, get_args=lambda: arguments)
    return ours.main()


def test_the_exit_status_says_whether_to_go_on(install: Callable[..., None]) -> None:
    assert run_of(install, 9) == 0
    assert run_of(install, 9, SystemExit(0)) == 0
    assert run_of(install, 5, SystemExit(0)) == ours.STOPPED == 143
    assert run_of(install, 0, skip_train=True) == 0
    with pytest.raises(SystemExit, match="7"):
        run_of(install, 5, SystemExit(7))


# Options -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    settings = {
        "data": {"train": ["a.h5"], "global_batch_size": 32, "max_atoms": 500},
        "model": {"num_layers": 3, "hidden_size": 64},
        "optim": {"lr": 3e-4, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 20},
        "training": {"train_epochs": 5},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_our_settings_are_defaults_of_its_options(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    given = ["--matris-config", str(config), "--train-iters", "200", "--tensor-model-parallel-size", "2"]
    arguments = parse_megatron([*given, "--model.hidden_size", "48"])
    found = {name: getattr(arguments, name) for name in ("num_layers", "hidden_size", "lr", "lr_wsd_decay_style")}
    assert found == {"num_layers": 3, "hidden_size": 48, "lr": 3e-4, "lr_wsd_decay_style": "minus_sqrt"}
    assert (arguments.global_batch_size, arguments.micro_batch_size) == (32, 8)
    assert arguments.lr_warmup_iters == 10
    assert arguments.gradient_accumulation_fusion is False
    assert arguments.seed == 1234


def test_its_options_win(config: Path) -> None:
    given = ["--matris-config", str(config), "--train-iters", "200", "--global-batch-size", "6", "--num-workers", "3"]
    settings = run_settings(parse_megatron([*given, "--context-parallel-size", "2", "--training.seed", "7"]))
    assert settings.data.global_batch_size == 6
    assert settings.data.num_workers == 3
    assert settings.data.max_atoms == 500
    assert settings.training.train_iters == 200
    assert settings.training.seed == 7
    assert settings.parallel.context_parallel_size == 2
    assert settings.parallel.expert_placement == "sharded"


def test_experts_over_ranks_have_homes(config: Path) -> None:
    given = ["--matris-config", str(config), "--train-iters", "9", "--expert-model-parallel-size", "2"]
    assert run_settings(parse_megatron(given)).parallel.expert_placement == "fixed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pipeline-model-parallel-size", "2"], "--pipeline-model-parallel-size 2 is not supported: its schedules"),
        (["--fp16"], "--fp16 True is not supported: a loss scale"),
        (["--bf16"], r"--training\.precision bf16-mixed"),
        (["--overlap-grad-reduce"], "without structures"),
        (["--use-torch-fsdp2"], "--use-distributed-optimizer"),
        (["--recompute-granularity", "full"], "no second derivative"),
        (["--calculate-per-token-loss"], "number of tokens"),
        (["--optimizer", "muon"], "--optimizer muon"),
        (["--dataloader-type", "cyclic"], "--dataloader-type cyclic"),
        (["--expert-tensor-parallel-size", "2"], "split over the tensor axis"),
        (["--train-samples", "100"], "give --train-iters"),
        (["--training.precision", "fp64"], "know no fp64"),
        (["--model.hidden_size", "many"], "model.hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused(config: Path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_megatron(["--matris-config", str(config), "--train-iters", "9", *given])


def test_epochs_are_refused(config: Path) -> None:
    with pytest.raises(ValueError, match="training.train_epochs is 5: Megatron's loop counts iterations"):
        parse_megatron(["--matris-config", str(config)])


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("data", "global_max_atoms", 900, "give --global-batch-size"),
        ("parallel", "fully_sharded_size", 2, "fully_sharded_size is 2"),
        ("optim", "decay_1d", True, "decay_1d is true"),
        ("optim", "backend", "te", "backend is te"),
    ],
)
def test_settings_that_the_loop_has_no_place_for(config: Path, group: str, name: str, value: Any, message: str) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["data"].pop("global_batch_size")
    settings.setdefault(group, {})[name] = value
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        parse_megatron(["--matris-config", str(config), "--train-iters", "9"])


def test_every_refusal_lets_megatrons_own_defaults_pass() -> None:
    arguments = megatron_parser().parse_args([])
    arguments.gradient_accumulation_fusion = False  # as our own default
    check_arguments(arguments)
    assert len({refusal.name for refusal in REFUSALS}) == len(REFUSALS)


# Batches -------------------------------------------------------------------------------------------------------------


class Sizes:
    """Records of which the sizes alone are known."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes)[:, None]

    def __getitem__(self, index: int) -> int:
        return index

    def identifier(self, index: int) -> str:
        return str(index)


def parts(sizes: list[int], *, count: int, world_size: int, **others: Any) -> list[list[list[int]]]:
    """Records of each micro-batch of each rank in the first step."""
    whole = WholeSet(num_records=len(sizes), num_batches=1)
    loaders = [
        CountedLoader(Sizes(sizes), whole, list, count=count, num_steps=1, rank=rank, world_size=world_size, **others)
        for rank in range(world_size)
    ]
    return [[list(part) for part in loader.plan(0)[1]] for loader in loaders]


def test_every_rank_has_as_many_parts() -> None:
    found = parts([5, 4, 3, 2, 1], count=3, world_size=2)
    assert [len(rank) for rank in found] == [3, 3]
    assert sorted(record for rank in found for part in rank for record in part) == [0, 1, 2, 3, 4]


def test_a_part_beyond_the_budget_is_refused() -> None:
    budget = Budget(limits=(6,), names=("atoms",))
    assert len(parts([5, 4, 3, 2, 1], count=2, world_size=2, budget=budget)) == 2
    with pytest.raises(ValueError, match="step 1 exceeds the budget .* give a smaller --micro-batch-size"):
        parts([5, 4, 3, 2, 1], count=1, world_size=2, budget=budget)


def test_every_pass_over_a_set_covers_it_once() -> None:
    whole = WholeSet(num_records=7, num_batches=3)
    for start in (0, 3):
        found = np.concatenate([whole.indices(start + step) for step in range(3)])
        assert found.tolist() == list(range(7))
