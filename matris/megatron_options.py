"""A run inside of Megatron-LM's training loop: our options in its parser, and which of its options do not fit.

Where Megatron has an option for a setting, that option holds: sizes of the axes, batch sizes, iterations, learning
rate. Our settings of the same name (from defaults, a preset or a YAML file) are its default. Imports no torch.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from matris.cli.train import parse
from matris.config import TASK_FIELDS, LossConfig, ModelConfig
from matris.presets import PRESETS
from matris.train_config import DataConfig, ParallelConfig, TrainConfig

_NO_OPTIONS = ("global_batch_size", "num_workers", "cost_model", "budget", "memory_gb")
"""Of the data: Megatron's own, or not for its loop."""
_OPTIONS = {
    "data": tuple(
        entry.name
        for entry in fields(DataConfig)
        if entry.name not in _NO_OPTIONS and not entry.name.startswith("global_max_")
    ),
    "model": tuple(entry.name for entry in fields(ModelConfig) if entry.name not in TASK_FIELDS),
    "loss": tuple(entry.name for entry in fields(LossConfig)),
    # Megatron's seed must not be 0, and is that of generators which nothing here draws from.
    "training": ("precision", "kernels", "recompute", "seed"),
    "parallel": ("graph_partitioner", "expert_fp16_wire"),
}
"""Settings of ours for which Megatron has no option."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An option of Megatron that does not fit.

    Attributes:
        name: in its namespace of arguments.
        allowed: its only values.
        reason: why, and what to do.
    """

    name: str
    allowed: tuple[Any, ...]
    reason: str


_NO = (None, False)
_ONE_STAGE = (
    "its schedules pass activations and first derivatives between stages, and the loss has forces, whose derivative by "
    "the weights runs back and forth through all layers twice: use tensor, context (graph) and data parallelism"
)
_FORMAT = "weights stay in fp32; choose --training.precision bf16-mixed for matrix products in bf16"
_SHARDED = (
    "it frees weights after the first backward pass, and forces need a second one: use --use-distributed-optimizer, or "
    "`janus-matris train --parallel.fully_sharded_size`"
)
_OVERLAP = (
    "it waits for a gradient of every weight in every micro-batch, and one without structures or without angles has "
    "none for some"
)
_RECOMPUTED = "a segment that Megatron recomputes has no second derivative; ours is recompute=selective or none"
_SHAPES = "every micro-batch has other shapes"
_STEPS = "the global batch is a function of the iteration: give --train-iters and a constant --global-batch-size"
_WHOLE_SET = "every evaluation covers the validation set once, cut into --eval-iters parts"

_FIXED = {
    "dataloader_type": "external",
    "exit_signal_handler": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "no_load_rng": True,
    "tokenizer_type": "NullTokenizer",
    "transformer_impl": "local",
    "vocab_size": 1,
}
"""Defaults for what belongs to language models; a checkpoint when a scheduler ends the job; and no states of generators
that nothing draws from, for they are those of one layout."""

REFUSALS = (
    Refusal(name="pipeline_model_parallel_size", allowed=(1,), reason=_ONE_STAGE),
    Refusal(name="num_layers_per_virtual_pipeline_stage", allowed=(None,), reason=_ONE_STAGE),
    Refusal(name="num_virtual_stages_per_pipeline_rank", allowed=(None,), reason=_ONE_STAGE),
    Refusal(name="pipeline_model_parallel_layout", allowed=(None,), reason=_ONE_STAGE),
    Refusal(name="fp16", allowed=_NO, reason=f"a loss scale belongs to half precision, and {_FORMAT}"),
    Refusal(name="bf16", allowed=_NO, reason=_FORMAT),
    Refusal(name="fp8", allowed=_NO, reason=_FORMAT),
    Refusal(name="fp4", allowed=_NO, reason=_FORMAT),
    Refusal(name="use_torch_fsdp2", allowed=_NO, reason=_SHARDED),
    Refusal(name="use_megatron_fsdp", allowed=_NO, reason=_SHARDED),
    Refusal(name="overlap_grad_reduce", allowed=_NO, reason=_OVERLAP),
    Refusal(
        name="overlap_param_gather",
        allowed=_NO,
        reason="it gathers a weight when its own module runs, and ours are also read by others",
    ),
    Refusal(
        name="gradient_accumulation_fusion",
        allowed=_NO,
        reason="it adds to the weight gradients during the backward pass that gives the forces",
    ),
    Refusal(
        name="calculate_per_token_loss",
        allowed=_NO,
        reason="it divides gradients by a number of tokens, and each term of the loss has a number of its own",
    ),
    Refusal(name="delay_wgrad_compute", allowed=_NO, reason=_RECOMPUTED),
    Refusal(name="recompute_granularity", allowed=(None,), reason=_RECOMPUTED),
    Refusal(name="recompute_activations", allowed=_NO, reason=_RECOMPUTED),
    Refusal(name="fine_grained_activation_offloading", allowed=_NO, reason=_RECOMPUTED),
    Refusal(name="overlap_moe_expert_parallel_comm", allowed=_NO, reason=_ONE_STAGE),
    Refusal(name="cuda_graph_impl", allowed=(None, "none"), reason=_SHAPES),
    Refusal(name="enable_cuda_graph", allowed=_NO, reason=_SHAPES),
    Refusal(name="external_cuda_graph", allowed=_NO, reason=_SHAPES),
    Refusal(name="sequence_parallel", allowed=_NO, reason="there is no sequence"),
    Refusal(name="hybrid_context_parallel", allowed=_NO, reason="the context axis is the graph axis"),
    Refusal(name="hierarchical_context_parallel_sizes", allowed=(None,), reason="the context axis is the graph axis"),
    Refusal(name="num_distributed_optimizer_instances", allowed=(None, 1), reason="only one was tried"),
    Refusal(name="init_model_with_meta_device", allowed=_NO, reason="the data sets reference energies and scale"),
    Refusal(name="rampup_batch_size", allowed=(None,), reason=_STEPS),
    Refusal(name="decrease_batch_size_if_needed", allowed=_NO, reason=_STEPS),
    Refusal(name="train_samples", allowed=(None,), reason=_STEPS),
    Refusal(name="phase_transition_iterations", allowed=(None,), reason=_STEPS),
    Refusal(name="iterations_to_skip", allowed=(None, []), reason="it would read batches of tokens"),
    Refusal(name="full_validation", allowed=_NO, reason=_WHOLE_SET),
    Refusal(name="multiple_validation_sets", allowed=_NO, reason=_WHOLE_SET),
    Refusal(name="dataloader_type", allowed=(None, "external"), reason="batches come from our data sets: leave it out"),
    Refusal(name="optimizer", allowed=("adam", "sgd"), reason="the others know the shapes of language models only"),
    Refusal(name="perform_rl_step", allowed=_NO, reason="it generates text"),
    Refusal(name="moe_use_upcycling", allowed=_NO, reason="`janus-matris convert` makes experts of a dense model"),
    Refusal(name="log_throughput", allowed=_NO, reason="it counts the operations of a language model"),
    Refusal(name="yaml_cfg", allowed=(None,), reason="it replaces all arguments, ours as well: give options"),
)


def check_arguments(arguments: Namespace) -> None:
    """Refuses options of Megatron that do not fit; those that its version does not have are not asked for.

    Raises:
        ValueError: the option, the reason, what to do.
    """
    for refusal in REFUSALS:
        value = getattr(arguments, refusal.name, refusal.allowed[0])
        if value not in refusal.allowed:
            option = f"--{refusal.name.replace('_', '-')}"
            raise ValueError(f"{option} {value} is not supported: {refusal.reason}")
    tensor, of_experts = arguments.tensor_model_parallel_size, getattr(arguments, "expert_tensor_parallel_size", None)
    if of_experts not in (None, tensor):
        raise ValueError(
            f"--expert-tensor-parallel-size is {of_experts}, and --tensor-model-parallel-size {tensor}: experts are "
            "split over the tensor axis as all other weights are; leave it out"
        )


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """Megatron's `extra_args_provider`: our options, and our settings as defaults of its own.

    Raises:
        ValueError: options that do not fit.
    """
    group = parser.add_argument_group("matris", "MatRIS: data, model and loss, as in `janus-matris train`")
    group.add_argument("--matris-config", metavar="FILE.yaml", help="settings, as `janus-matris train --config`")
    group.add_argument("--matris-preset", choices=tuple(PRESETS), help="a published model size, to start from")
    group.add_argument("--matris-init-from", metavar="DIR", help="model directory to fine-tune")
    for dest in _names():
        group.add_argument(f"--{dest}", nargs="+", metavar="VALUE", help="see janus-matris train --help")
    parser.set_defaults(**_FIXED)
    known, _ = parser.parse_known_args()
    # Before Megatron's own checks, which do not say why, and before it starts anything.
    check_arguments(known)
    config = read_settings(known)
    if config.training.precision == "fp64":
        raise ValueError("training.precision is fp64: Megatron's optimizers know no fp64; use `janus-matris train`")
    parser.set_defaults(**_defaults(config, known))
    return parser


def read_settings(arguments: Namespace) -> TrainConfig:
    """Our settings as they are given, with the options of Megatron that have been parsed in place of ours.

    Raises:
        ValueError: unknown names, values of the wrong type or out of range.
    """
    given: list[str] = []
    for option in ("config", "preset", "init_from"):
        value = getattr(arguments, f"matris_{option}")
        given += [] if value is None else [f"--{option}", value]
    for dest in _names():
        values = getattr(arguments, dest)
        given += [] if values is None else [f"--{dest}", *values]
    if arguments.train_iters is not None:
        given += ["--training.train_epochs", "null", "--training.train_iters", str(arguments.train_iters)]
    config = parse(given)
    _check_settings(config)
    return config


def run_settings(arguments: Namespace) -> TrainConfig:
    """The settings of the run, from Megatron's final arguments.

    Raises:
        ValueError: as `read_settings`.
    """
    config, expert = read_settings(arguments), arguments.expert_model_parallel_size
    return replace(
        config,
        data=replace(config.data, global_batch_size=arguments.global_batch_size, num_workers=arguments.num_workers),
        parallel=replace(
            config.parallel,
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            context_parallel_size=arguments.context_parallel_size,
            expert_model_parallel_size=expert,
            # Gathered pieces of experts live outside of the modules that Megatron's gradient buffers know.
            expert_placement="fixed" if expert > 1 else ParallelConfig.expert_placement,
        ),
    )


def _names() -> Iterator[str]:
    for group, names in _OPTIONS.items():
        yield from (f"{group}.{name}" for name in names)


def _check_settings(config: TrainConfig) -> None:
    """Refuses settings, from a YAML file, that the loop has no place for."""
    if config.training.train_epochs is not None:
        raise ValueError(
            f"training.train_epochs is {config.training.train_epochs}: Megatron's loop counts iterations; give "
            "--train-iters"
        )
    if config.data.has_global_budget:
        raise ValueError(
            "data.global_max_atoms, global_max_edges and global_max_angles: Megatron's loop counts structures; give "
            "--global-batch-size"
        )
    if config.data.cost_model != "formula":
        raise ValueError(f"data.cost_model is {config.data.cost_model}: in Megatron's loop only formula; leave it out")
    if config.data.budget != "given":
        raise ValueError(
            f"data.budget is {config.data.budget}: Megatron's loop has micro-batches of a given number of structures; "
            "leave it out, and give data.max_atoms, max_edges or max_angles"
        )
    if config.parallel.fully_sharded_size > 1:
        raise ValueError(f"parallel.fully_sharded_size is {config.parallel.fully_sharded_size}: {_SHARDED}")
    if config.optim.decay_1d:
        raise ValueError("optim.decay_1d is true: Megatron's optimizers spare biases and norms; leave it out")
    if config.optim.backend != "auto":
        raise ValueError(
            f"optim.backend is {config.optim.backend}: Megatron's loop has an optimizer of its own; leave it out"
        )


def _defaults(config: TrainConfig, known: Namespace) -> dict[str, Any]:
    """Defaults of Megatron's options."""
    data, optim, training, model = config.data, config.optim, config.training, config.model
    from janus.mesh import read_launch

    replicas = max(1, read_launch().world_size // (known.tensor_model_parallel_size * known.context_parallel_size))
    structures = known.global_batch_size or data.structures_per_update or 1
    warmup = (training.train_iters or 0) // 20 if optim.lr_warmup_iters is None else optim.lr_warmup_iters
    ours = {
        "global_batch_size": structures,
        # By default one micro-batch for each rank.
        "micro_batch_size": max(1, structures // replicas),
        "num_workers": data.num_workers,
        "train_iters": training.train_iters,
        "eval_interval": training.eval_interval,
        "save_interval": training.save_interval,
        "log_interval": training.log_interval,
        "lr": optim.lr,
        "min_lr": optim.min_lr,
        "lr_decay_style": optim.lr_decay_style,
        "lr_warmup_iters": warmup,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_eps": optim.adam_eps,
        "clip_grad": optim.clip_grad,
    }
    if optim.lr_decay_style == "WSD":
        ours |= {"lr_wsd_decay_iters": optim.lr_wsd_decay_iters, "lr_wsd_decay_style": "minus_sqrt"}
    # What its checks ask of every model.
    required = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.hidden_size,
        "num_experts": model.num_moe_experts or None,
        "seq_length": 2 * known.context_parallel_size,
        "max_position_embeddings": 2 * known.context_parallel_size,
    }
    return {name: value for name, value in (ours | required).items() if value is not None}
