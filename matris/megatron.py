"""Training in Megatron-LM's own loop: what its `pretrain` asks of a model. `python -m matris.megatron [OPTIONS]`.

Megatron has the loop: process groups, gradient buffers, optimizer, learning rate, checkpoints, logs. The model with its
modules on those groups, the data in the global batches of `janus-matris train`, and the loss are ours. See
docs/decisions/megatron.md.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import janus
from janus.comm.collectives import on_main_rank
from janus.data.loader import StepLoader
from janus.data.packing import plan_micro_batches
from janus.data.sampler import Sampler
from janus.mesh import Mesh, open_mesh
from janus.ops.fused import use_kernels
from janus.sharding.logical import EXPERT_ATTRIBUTE, split_of, wholes_of
from matris.blocks.module import MatRISConfig
from matris.calibration import formula_cost
from matris.data.dataset import MicroBatch, StructureDataset, graph_budget, label_totals
from matris.evaluation import collate_for
from matris.graph.batch import LabelTotals
from matris.megatron_options import add_options, run_settings
from matris.setup import Subject, build_subject
from matris.task import TERMS
from matris.train_config import TrainConfig

STOPPED = 143
"""Exit status of a run that ended before its last iteration, as that of `janus-matris train`."""

VERSIONS = ((0, 16), (0, 17), (0, 18), (0, 19))
"""Of Megatron, whose loop was read; docs/decisions/megatron.md says what was run."""

_PROVIDERS = ("train_valid_test_dataset_provider", "model_provider", "model_type", "forward_step_func")


# What is installed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop that is installed.

    Attributes:
        start: trains; takes what `_PROVIDERS` names, and the command line.
        get_args: its arguments, once they are parsed.
        model_type: the value for a model without an encoder of its own.
    """

    start: Callable[..., None]
    get_args: Callable[[], Namespace]
    model_type: Any


def find_loop() -> Loop:
    """The installed `megatron.training`, if its version and signatures are known.

    Raises:
        ValueError: it is missing or unknown; says what is there, what is supported, and what to do.
    """
    core, training = _import("megatron.core"), _import("megatron.training")
    version = str(core.__version__)
    supported = ", ".join(f"{major}.{minor}" for major, minor in VERSIONS)
    use = f"use Megatron-LM {supported}, or `janus-matris train`, which needs no megatron.training"
    if not any(version.startswith(f"{major}.{minor}.") for major, minor in VERSIONS):
        raise ValueError(f"Megatron is of version {version}, whose training loop is not known: {use}")
    pretrain = getattr(training, "pretrain", None)
    if pretrain is None or not hasattr(training, "get_args"):
        raise ValueError(f"megatron.training {version} has no pretrain and get_args: {use}")
    parameters = inspect.signature(pretrain).parameters
    # As of 0.18 whoever calls it parses the arguments.
    arguments_in = "cfg_container" if "cfg_container" in parameters else "extra_args_provider"
    provided = (*_PROVIDERS, arguments_in)
    missing = [name for name in provided if name not in parameters]
    unknown = [
        name
        for name, entry in parameters.items()
        if name not in provided
        and entry.default is entry.empty
        and entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)
    ]
    if missing or unknown:
        differences = [f"lacks {', '.join(missing)}"] if missing else []
        differences += [f"asks for {', '.join(unknown)}"] if unknown else []
        raise ValueError(
            f"megatron.training.pretrain of version {version} {' and '.join(differences)}; its signature is "
            f"({', '.join(parameters)}): {use}"
        )
    start: Callable[..., None]
    if arguments_in == "extra_args_provider":
        start = partial(pretrain, extra_args_provider=add_options)
    else:
        parse = getattr(_import("megatron.training.arguments"), "parse_and_validate_args", None)
        contain = getattr(_import("megatron.training.argument_utils"), "pretrain_cfg_container_from_args", None)
        if parse is None or contain is None:
            raise ValueError(
                f"megatron.training {version} has no parse_and_validate_args and pretrain_cfg_container_from_args: "
                f"{use}"
            )

        def in_a_container(**providers: Any) -> None:
            pretrain(cfg_container=contain(parse(extra_args_provider=add_options)), **providers)

        start = in_a_container

    return Loop(
        start=start,
        get_args=training.get_args,
        model_type=_import("megatron.core.enums").ModelType.encoder_or_decoder,
    )


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise ValueError(f"{name} needs the module {error.name}, which is not installed: install it") from error
        raise ValueError(
            f"{name} is not installed: the package megatron-core holds megatron.core alone. Get Megatron-LM (git clone "
            "--branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM) and put its folder on PYTHONPATH, or use "
            "`janus-matris train`, which needs no megatron.training"
        ) from error


# Batches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """One micro-batch of one rank.

    Attributes:
        micro_batch: its structures, maybe none.
        totals: denominators of the loss, of the global batch (or of the whole validation set).
        share: what it counts in the sum that divides the reported values; 1 over all parts that they are the sum of.
    """

    micro_batch: MicroBatch
    totals: LabelTotals
    share: float


class CountedLoader(StepLoader[MicroBatch]):
    """As many micro-batches in every step and on every rank, some of them maybe without structures.

    A global batch is balanced over all of them by the cost of its structures. Budgets hold, or are an error.

    Args:
        count: micro-batches of a rank in a step.
        **others: as `StepLoader`.
    """

    def __init__(self, *arguments: Any, count: int, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.count = count

    def plan(self, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Records of the global batch, and those of each of this rank's micro-batches.

        Raises:
            ValueError: one is larger than the budget.
        """
        indices = self.sampler.indices(step)
        sizes = self.dataset.sizes[indices]
        shares = plan_micro_batches(
            sizes,
            num_ranks=self.world_size * self.count,
            budget=self.budget,
            cost=self.cost(sizes),
        )
        if any(len(share) > 1 for share in shares):
            raise ValueError(
                f"a micro-batch of step {step + 1} exceeds the budget of data.max_atoms, max_edges or max_angles: give "
                f"a smaller --micro-batch-size (now {self.count} micro-batches for each rank), or a larger budget"
            )
        own = shares[self.rank * self.count : (self.rank + 1) * self.count]
        return indices, [indices[share[0]] if share else np.empty(0, np.int64) for share in own]


@dataclass(frozen=True, kw_only=True)
class WholeSet:
    """Every record once in so many batches, again and again."""

    num_records: int
    num_batches: int

    def indices(self, step: int) -> np.ndarray:
        """Records of a batch."""
        cuts = [(step % self.num_batches + end) * self.num_records // self.num_batches for end in (0, 1)]
        return np.arange(*cuts)


# The providers -------------------------------------------------------------------------------------------------------


@dataclass
class LoopConfig(MatRISConfig):
    """With what Megatron's schedules and gradient buffers read of the configuration of a transformer.

    Attributes:
        calculate_per_token_loss, cuda_graph_impl, fine_grained_activation_offloading, moe_router_enable_expert_bias,
            moe_router_load_balancing_type, qk_layernorm: always off.
    """

    calculate_per_token_loss: bool = False
    cuda_graph_impl: str = "none"
    fine_grained_activation_offloading: bool = False
    moe_router_enable_expert_bias: bool = False
    moe_router_load_balancing_type: str = "none"
    qk_layernorm: bool = False


class Job:
    """What `pretrain` calls, in this order: `build_model`, `build_datasets`, then `forward_step` for each micro-batch.

    Args:
        get_args: Megatron's final arguments, once there are some.
        stack: holds the mesh open until the end of the run.
    """

    def __init__(self, get_args: Callable[[], Namespace], stack: ExitStack) -> None:
        self._get_args, self._stack = get_args, stack
        self._mesh = Mesh()
        self._config: TrainConfig | None = None
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """Data, model and loss, once there is a model."""
        assert self._subject is not None, "the model is built first"
        return self._subject

    @property
    def num_parts(self) -> int:
        """Micro-batches of a rank in an iteration."""
        arguments = self._get_args()
        return int(arguments.global_batch_size) // int(arguments.micro_batch_size * self._mesh.batch.size)

    def build_model(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> nn.Module:
        """The model on Megatron's process groups. All ranks call it.

        Args:
            pre_process, post_process, vp_stage: of pipelines, of which there are none.
            config: unused; the model has its own.
            pg_collection: Megatron's groups, which it looks for on the model.

        Raises:
            ValueError, OSError: a mistake in the settings or the data.
        """
        arguments = self._get_args()
        self._config = settings = run_settings(arguments)
        parallel = settings.parallel
        self._mesh = self._stack.enter_context(
            open_mesh(
                settings.training.device,
                graph=parallel.context_parallel_size,
                tensor=parallel.tensor_model_parallel_size,
                expert=parallel.expert_model_parallel_size,
                watched=False,
            )
        )
        use_kernels(settings.training.kernels, self._mesh.device)
        self._subject = build_subject(settings, self._mesh)
        model = self._subject.task.model
        own = {entry.name: getattr(model.config, entry.name) for entry in fields(MatRISConfig)}
        model.config = LoopConfig(**own)
        for parameter in model.parameters():
            if getattr(parameter, EXPERT_ATTRIBUTE, False):
                parameter.allreduce = False  # its gradient is summed over the ranks that have the same experts
        model.pg_collection = pg_collection
        model.set_input_tensor = _has_no_input_tensor
        if arguments.save is not None:
            self._describe(Path(arguments.save) / "model")
        return model

    def build_datasets(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Iterator[Part] | None, ...]:
        """Iterators over this rank's micro-batches of training, validation and test; None where there is no data.

        Args:
            num_samples: unused; the loop counts iterations.
            vp_stage: of pipelines, of which there are none.
        """
        arguments, datasets = self._get_args(), self.subject.datasets
        if datasets.valid is None:
            arguments.eval_iters = 0
        # Not the number of iterations, which counts from the last phase of a resumed run.
        start = int(arguments.consumed_train_samples) // int(arguments.global_batch_size)
        train = self._parts(datasets.train, self.subject.sampler, start, int(arguments.train_iters) - start)
        return train, self._evaluation_parts(datasets.valid), self._evaluation_parts(datasets.test)

    def forward_step(self, data_iterator: Iterator[Part], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        """The loss of the next micro-batch, so scaled that Megatron's averages are our sums; and what reads it."""
        task = self.subject.task
        timers = task.model.config.timers
        if timers is not None:
            timers("batch-generator", log_level=2).start()
        part = next(data_iterator)
        if timers is not None:
            timers("batch-generator").stop()
        loss = task.loss(part.micro_batch, part.totals, training=torch.is_grad_enabled())
        # Megatron divides by the count below, by the micro-batches and by the ranks that have parts of a gradient.
        scaled = loss.total * (self.num_parts * self._mesh.replicas.size)

        def read(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            share = loss.sums.new_tensor(part.share)
            reported = {name: torch.stack([value, share]) for name, value in zip(TERMS, loss.sums, strict=False)}
            return output, torch.ones((), dtype=torch.int, device=output.device), reported

        return scaled, read

    def _describe(self, directory: Path) -> None:
        """The model before its training, which says what Megatron's checkpoints do not: hyper-parameters, elements."""
        if not on_main_rank(lambda: not directory.exists(), self._mesh):
            return
        task = self.subject.task
        splits = {name: split_of(parameter) for name, parameter in task.model.named_parameters()}
        state = wholes_of(task.model.state_dict(), splits, self._mesh)
        provenance = {"janus_matris": janus.__version__, "torch": torch.__version__, "step": 0}
        on_main_rank(lambda: task.export(directory, state, provenance), self._mesh)

    def _evaluation_parts(self, dataset: StructureDataset | None) -> Iterator[Part] | None:
        """The set once in each evaluation."""
        num_batches = int(self._get_args().eval_iters)
        if dataset is None or num_batches == 0:
            return None
        sampler = WholeSet(num_records=len(dataset), num_batches=num_batches)
        totals = label_totals(dataset)
        return self._parts(dataset, sampler, 0, sys.maxsize, totals=totals, num_batches=num_batches)

    def _parts(
        self,
        dataset: StructureDataset,
        sampler: Sampler,
        start: int,
        num_steps: int,
        *,
        totals: LabelTotals | None = None,
        num_batches: int = 1,
    ) -> Iterator[Part]:
        """
        Args:
            totals: of all batches together; None for those of each batch.
            num_batches: that the reported values are the sum of.
        """
        assert self._config is not None
        data, model, count = self._config.data, self.subject.task.model, self.num_parts
        loader = CountedLoader(
            dataset,
            sampler,
            collate_for(model, dataset, self._config.parallel.graph_partitioner),
            count=count,
            start_step=start,
            num_steps=num_steps,
            rank=self._mesh.batch.rank,
            world_size=self._mesh.batch.size,
            budget=graph_budget(max_atoms=data.max_atoms, max_edges=data.max_edges, max_angles=data.max_angles),
            cost=formula_cost(model.hyper).of_records,
            num_workers=data.num_workers,
            pin_memory=self._mesh.device.type == "cuda",
        )
        share = 1.0 / (num_batches * count * self._mesh.replicas.size)

        def parts() -> Iterator[Part]:
            for batch in loader:
                of_batch = totals or label_totals(dataset, batch.indices)
                for micro_batch in batch.micro_batches:
                    yield Part(micro_batch=micro_batch, totals=of_batch, share=share)

        return parts()


def _has_no_input_tensor(tensor: Any) -> None:
    """Pipelines would give a stage its input so."""


def main() -> int:
    """Trains with Megatron's options and ours, from the command line. All ranks of a launch call it.

    Returns:
        Exit status: 0; `STOPPED` when a signal or time limit of Megatron's ended the run early; 2 for a mistake.
    """
    try:
        return _train(find_loop())
    except (ValueError, OSError) as error:
        if _is_of_megatron(error):  # needs its traceback
            raise
        print(f"python -m matris.megatron: error: {error}", file=sys.stderr)
        return 2


def _is_of_megatron(error: BaseException) -> bool:
    """Whether Megatron's own code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("megatron.")


def _train(loop: Loop) -> int:
    with ExitStack() as stack:
        job = Job(loop.get_args, stack)

        def datasets(num_samples: Any, vp_stage: int | None = None) -> Sequence[Iterator[Part] | None]:
            return job.build_datasets(num_samples, vp_stage)

        # Slurm's warning before the time limit; Megatron saves and ends on SIGTERM alone.
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        datasets.is_distributed = True  # type: ignore[attr-defined]  # all ranks of the tensor axis read
        try:
            loop.start(
                train_valid_test_dataset_provider=datasets,
                model_provider=job.build_model,
                model_type=loop.model_type,
                forward_step_func=job.forward_step,
            )
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        arguments = loop.get_args()
        done = int(arguments.consumed_train_samples) // int(arguments.global_batch_size)
        return STOPPED if done < arguments.train_iters and not arguments.skip_train else 0


if __name__ == "__main__":
    sys.exit(main())
