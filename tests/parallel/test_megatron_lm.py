"""Our providers under Megatron's own gradient buffers and schedule, fp64: the gradients of one process of ours.

Both ask for a GPU in two places, and get the CPU: Megatron's arithmetic and communication are as they are.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from torch.overrides import TorchFunctionMode

from janus.mesh import Mesh
from janus.sharding import Weights
from janus.training.evaluation import evaluate
from janus.training.step import accumulate_gradients
from matris.blocks.module import ExpertOptions
from matris.config import Precision
from matris.exported import load_model
from matris.megatron import Job
from matris.megatron_options import run_settings
from matris.model import MatRIS
from matris.setup import build_setup
from matris.task import TERMS
from matris.train_config import TrainConfig
from tests.matris.megatron_arguments import parse_megatron
from tests.matris.train.labelled import TINY, write_files
from tests.parallel.ranks import run_ranks

STEPS = 2
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 6, "kv_channels": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron")
    write_files(path)
    return path


def options(folder: Path, *others: str, experts: bool = False) -> list[str]:
    """On the command line of `python -m matris.megatron`, fp64 aside."""
    model = {**TINY.to_dict(), **(EXPERTS if experts else {})}
    hidden = ("tasks", "charge_tasks", "spin_tasks")
    config = folder / f"settings{int(experts)}.yaml"
    settings = {
        "data": {
            "train": [str(folder / "train.xyz")],
            "valid": [str(folder / "valid.xyz")],
            "cache_dir": str(folder / "cache"),
        },
        "model": {name: value for name, value in model.items() if name not in hidden},
        "loss": {"magmoms_weight": 0.5},
        "training": {"device": "cpu", "train_iters": STEPS},
        "optim": {"lr_decay_style": "constant"},
    }
    config.write_text(yaml.safe_dump(settings))
    return ["--matris-config", str(config), "--num-workers", "0", "--eval-iters", "2", *others]


class OnTheCpu(TorchFunctionMode):
    """What is made for a GPU is made here."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def through_megatron(mesh: Mesh, given: list[str], ddp: dict[str, Any]) -> dict[str, Any]:
    """Whole gradients of each step, reported sums, and those of an evaluation, on this rank."""
    if mesh.world_size == 1:  # Megatron makes groups of one rank, too
        torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    arguments = parse_megatron(given)
    setattr(arguments, "training.precision", ["fp64"])  # which its optimizers refuse, and this test has none
    with (
        ExitStack() as stack,
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
        OnTheCpu(),
    ):
        job = Job(lambda: arguments, stack)
        model = job.build_model()
        model.model_type = ModelType.encoder_or_decoder  # as its loop does
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(**ddp), model)
        model.config.finalize_model_grads_func = finalize_model_grads
        train, valid, test = job.build_datasets(None)
        assert test is None

        def run(iterator: Any, *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
            return forward_backward_no_pipelining(
                forward_step_func=job.forward_step,
                data_iterator=iterator,
                model=wrapped,
                num_microbatches=job.num_parts,
                seq_length=1,
                micro_batch_size=1,
                forward_only=forward_only,
            )

        gradients, reports = [], []
        for _ in range(STEPS):
            wrapped.zero_grad_buffer()
            reports.append(summed(run(train, forward_only=False)))
            gradients.append({name: value.main_grad.clone() for name, value in trained(model).items()})
        with torch.no_grad():
            evaluations = [
                summed([part for _ in range(arguments.eval_iters) for part in run(valid, forward_only=True)])
                for _ in range(2)
            ]
        assert next(train, None) is None
    assert all(value.grad is None for value in model.parameters())
    weights = Weights(model, mesh, experts=model.expert_sites())
    return {
        "gradients": [weights.gather(entry) for entry in gradients],
        "reports": reports,
        "evaluations": evaluations,
        "counts": mesh.tensor.rank == 0,
    }


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def summed(reports: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([report[name] for report in reports]).sum(dim=0) for name in TERMS}


def on_one_process(given: list[str]) -> TrainConfig:
    """The settings without ranks, fp64."""
    config = run_settings(parse_megatron(given))
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_placement="sharded",
    )
    return replace(config, parallel=parallel, training=replace(config.training, precision="fp64"))


def by_ourselves(given: list[str]) -> dict[str, Any]:
    """The same on one process, with the pieces of our own step."""
    mesh = Mesh()
    setup = build_setup(on_one_process(given), mesh)
    gradients, losses = [], []
    for batch in setup.train.batches(0):
        setup.learner.zero_gradients()
        parts = accumulate_gradients(setup.task, batch.micro_batches, setup.train.totals(batch.indices), setup.learner)
        gradients.append(setup.learner.gather_gradients())
        losses.append(torch.stack([part.sums for part in parts]).sum(dim=0)[: len(TERMS)])
    assert setup.valid is not None
    sums = evaluate(setup.task, setup.valid, mesh, step=0)
    return {"gradients": gradients, "losses": losses, "evaluation": torch.from_numpy(sums)[: len(TERMS)]}


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank in ranks:
        assert len(rank["gradients"]) == len(expected["gradients"]) == STEPS
        for found, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            scale = max(float(value.abs().max()) for value in wanted.values())
            for name, value in found.items():
                # Weights that the loss does not depend on have zeros in Megatron's buffers.
                expected_value = wanted.get(name, torch.zeros_like(value))
                torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12 * scale, msg=name)
            assert found.keys() >= wanted.keys()
    counted = [rank for rank in ranks if rank["counts"]]
    for step, losses in enumerate(expected["losses"]):
        check_sums([rank["reports"][step] for rank in counted], losses)
    for repetition in range(2):
        check_sums([rank["evaluations"][repetition] for rank in counted], expected["evaluation"])


def check_sums(reports: list[dict[str, torch.Tensor]], expected: torch.Tensor) -> None:
    """Of all ranks that Megatron sums over: value and what it divides by."""
    for name, value in zip(TERMS, expected, strict=True):
        total = sum(report[name] for report in reports)
        torch.testing.assert_close(total, torch.stack([value, torch.ones_like(value)]), rtol=1e-10, atol=1e-12)


PLAIN: dict[str, Any] = {}
CASES = {
    "one rank, one micro-batch": (1, {}, ["--micro-batch-size", "10"], PLAIN),
    "data": (2, {}, ["--micro-batch-size", "5"], PLAIN),
    "data, parts without structures": (2, {}, ["--micro-batch-size", "1"], PLAIN),
    "data, averaged while it is sent": (2, {}, [], {"average_in_collective": True}),
    "tensor": (2, {"tensor": 2}, ["--tensor-model-parallel-size", "2", "--micro-batch-size", "5"], PLAIN),
    "graph": (2, {"graph": 2}, ["--context-parallel-size", "2", "--micro-batch-size", "5"], PLAIN),
    "data, graph": (4, {"graph": 2}, ["--context-parallel-size", "2", "--micro-batch-size", "1"], PLAIN),
    "tensor, graph": (
        4,
        {"tensor": 2, "graph": 2},
        ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"],
        PLAIN,
    ),
}
WITH_EXPERTS = {
    "experts": (2, {"expert": 2}, ["--expert-model-parallel-size", "2", "--micro-batch-size", "1"], PLAIN),
    "experts, graph": (
        4,
        {"expert": 2, "graph": 2},
        ["--expert-model-parallel-size", "2", "--context-parallel-size", "2"],
        PLAIN,
    ),
    "experts, tensor": (
        4,
        {"expert": 2, "tensor": 2},
        ["--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2"],
        PLAIN,
    ),
}


# Of 24 structures batches of at most 10 have 8: with ten micro-batches two are empty.
BATCH = ["--global-batch-size", "10"]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return by_ourselves(options(folder, *BATCH))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_our_step(folder: Path, expected: dict[str, Any], case: str) -> None:
    world_size, layout, given, ddp = CASES[case]
    compare(run_ranks(world_size, through_megatron, options(folder, *BATCH, *given), ddp, layout=layout), expected)


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_gradients_of_experts(folder: Path, case: str) -> None:
    world_size, layout, given, ddp = WITH_EXPERTS[case]
    ranks = run_ranks(world_size, through_megatron, options(folder, *BATCH, *given, experts=True), ddp, layout=layout)
    compare(ranks, by_ourselves(options(folder, *BATCH, experts=True)))


def test_the_model_is_described_beside_the_checkpoints(folder: Path) -> None:
    """Whole, from ranks that share experts and matrix products."""
    given = ["--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2", "--save", str(folder / "save")]
    arguments = options(folder, *BATCH, *given, experts=True)
    run_ranks(4, build_only, arguments, layout={"expert": 2, "tensor": 2})
    found = load_model(folder / "save" / "model", precision=Precision.fp64)
    expected = build_setup(on_one_process(arguments), Mesh()).model
    assert found.elements == expected.elements
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-12, atol=0.0, msg=name)


def build_only(mesh: Mesh, given: list[str]) -> None:
    arguments = parse_megatron(given)
    setattr(arguments, "training.precision", ["fp64"])
    with ExitStack() as stack:
        Job(lambda: arguments, stack).build_model()


def experts_in_a_checkpoint(mesh: Mesh) -> dict[str, Any]:
    """Place, whether it is the one that is written, and values of this rank's experts, by key."""
    model = MatRIS(
        replace(TINY, **EXPERTS), precision=Precision.fp64, seed=3, mesh=mesh, experts=ExpertOptions(placement="fixed")
    )
    found = {name: value for name, value in model.sharded_state_dict().items() if "experts" in name}
    return {
        name: (value.global_shape, value.global_offset, value.replica_id == (0, 0, 0), value.data.detach())
        for name, value in found.items()
        if ".router." not in name
    }


@pytest.mark.parametrize("layout", [{"expert": 2}, {"expert": 2, "tensor": 2}, {"expert": 2, "graph": 2}])
def test_experts_in_a_checkpoint_are_parts_of_all(layout: dict[str, int]) -> None:
    """So that another expert axis, or none, can read them."""
    whole = MatRIS(replace(TINY, **EXPERTS), precision=Precision.fp64, seed=3).state_dict()
    ranks = run_ranks(4 if len(layout) > 1 else 2, experts_in_a_checkpoint, layout=layout)
    assert len(ranks[0]) == 6
    for name in ranks[0]:
        written = torch.zeros_like(whole[name])
        for shape, offset, is_written, values in (rank[name] for rank in ranks):
            assert shape == whole[name].shape
            place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
            torch.testing.assert_close(values, whole[name][place], rtol=0.0, atol=0.0)
            written[place] += float(is_written)
        assert bool((written == 1.0).all()), name
