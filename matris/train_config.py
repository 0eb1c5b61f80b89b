"""Settings of a training run, as frozen dataclasses. Field names are Megatron's where it has one. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal

from matris.config import LossConfig, ModelConfig

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class LabelWeights:
    """Factors of a task's structures in the terms of the loss, beside the weights of the loss itself.

    Attributes:
        energy, forces, stress, magmoms: at least 0, not all of them 0.
    """

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 1.0
    magmoms: float = 1.0

    def __post_init__(self) -> None:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name, value in values.items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"label_weights.{name} is {value}: it must be a finite number, at least 0")
        if not any(values.values()):
            raise ValueError("label_weights are all 0: nothing would be learned of the task; leave it out to skip it")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The data of one level of theory, for a model that learns several.

    Attributes:
        name: of the level of theory, by which the model is asked for it.
        train, valid, test: files, as in `DataConfig`.
        weight: how often its structures are drawn, relative to those of other tasks, see `data.task_temperature`.
        label_weights: factors of its structures in the terms of the loss.
        max_force: leave out structures with a force longer than this, eV/A.
        max_stress: leave out structures with a stress component larger than this, eV/A^3.
        needs: `charge`, `spin`: what every structure of this task must state (total charge, spin multiplicity); the
            calculator then asks for it.
        reference_energies: `fit`, `none`, `isolated`, `base` or a JSON file; None for that of `data`.
        energy_key, forces_key, stress_key, virials_key, magmoms_key, stress_unit: as in `DataConfig`; None for those of
            `data`.
    """

    name: str
    train: list[str]
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    weight: float = 1.0
    label_weights: LabelWeights = field(default_factory=LabelWeights)
    max_force: float | None = None
    max_stress: float | None = None
    needs: list[Literal["charge", "spin"]] = field(default_factory=list)
    reference_energies: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virials_key: str | None = None
    magmoms_key: str | None = None
    stress_unit: Literal["eV/A^3", "GPa", "kbar-vasp"] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("data.tasks has an entry without a name: give each task one, such as name: pbe")
        where = f"data.tasks[{self.name}]"
        if not self.train:
            raise ValueError(f"{where}.train is empty: give at least one file")
        if not 0.0 < self.weight < float("inf"):
            raise ValueError(f"{where}.weight is {self.weight}: it must be positive; leave the task out to skip it")
        for name in ("max_force", "max_stress"):
            if (value := getattr(self, name)) is not None and not value > 0.0:
                raise ValueError(f"{where}.{name} is {value}: it must be positive")
        for name in self.needs:
            if name not in ("charge", "spin"):
                raise ValueError(f"{where}.needs has {name!r}: allowed are charge and spin")
        _check_reference_energies(f"{where}.reference_energies", self.reference_energies)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from, and in which portions.

    Attributes:
        train: training data: HDF5 stores of `janus-matris prepare`, or files that ASE reads (prepared on first use).
        valid: validation data; empty: `valid_fraction` of the training data.
        test: test data, evaluated with the best model at the end.
        tasks: in place of `train`, `valid` and `test`: the data of several levels of theory, each with a name, files,
            weights and limits of its own (`TaskConfig`); one model learns them all. As YAML, or as JSON on the command
            line: --data.tasks '[{"name": "pbe", "train": ["a.xyz"]}, ...]'.
        task_temperature: an epoch draws as many structures as the tasks have together, of each task a part that is
            proportional to its weight times n^(1 / temperature), n being its number of structures. 1 (by default): each
            structure once, where weights are equal; larger values draw more from small tasks.
        valid_fraction: share of the training structures that is set aside, by `training.seed`, where `valid` is empty;
            leave it out where `valid` is given.
        split_key: info entry of every frame (a trajectory, a composition): `valid_fraction` then sets whole groups
            aside, and no group is on both sides. Stores must have been prepared with the same --split_key.
        global_batch_size: structures per update, over all ranks and micro-batches together; 16 unless one of the next
            three is given.
        global_max_atoms: in place of `global_batch_size`: atoms per update, over all ranks and micro-batches together;
            an update takes as many structures as fit.
        global_max_edges: likewise, directed edges per update.
        global_max_angles: likewise, angles per update.
        max_atoms: atoms per micro-batch of one rank, or of the ranks of a graph axis, which divide them; a larger share
            is cut and its gradients accumulated.
        max_edges: directed edges per micro-batch.
        max_angles: angles per micro-batch.
        budget: `auto` also limits the predicted memory of a micro-batch to what the device has beside the weights, and
            names structures that need more on their own before the first update; `given`: only the limits above.
        memory_gb: GB (1e9 bytes) that each rank may use, with `budget auto`; on CUDA by default what is free there. On
            CPU it is of the whole process without its `num_workers`: libraries, and what the allocator loses, which
            depends on it (docs/training.md), are taken off.
        cost_model: by which an update's structures are divided evenly over the ranks: `formula`, the FLOPs of their
            atoms, edges and angles; or `calibrated`, the times of a few micro-batches at the start of the run, which a
            resumed run keeps (another start of the same run may divide them otherwise, as clocks do).
        num_workers: processes per rank that build graphs ahead; 0 builds them in the training process.
        cache_dir: where raw files are prepared to, and what all ranks of a machine need to know of large data sets; by
            default `~/.cache/janus-matris`.
        energy_key: name of the total energy (eV) in raw files; by default REF_energy, then energy; likewise below.
        forces_key: name of the forces (eV/A).
        stress_key: name of the stress.
        virials_key: name of the virials (eV), used where there is no stress.
        magmoms_key: name of the magnetic moments (Bohr magnetons).
        stress_unit: unit and sign of the stress in raw files; `kbar-vasp` has compression positive.
        reference_energies: atomic reference energies: `fit` (least squares on the compositions of the training data),
            `none`, `isolated` (single-atom structures in the training data), `base` (those of `init_from`), or a JSON
            file {"Si": -0.82, ...} in eV. By default `base` with `init_from`, else `fit`.
        energy_scale: factor of the network's energies: `rms_forces` (RMS force component of the training data), or a
            number in eV. With `init_from` that of the base model is kept.
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    tasks: list[TaskConfig] = field(default_factory=list)
    task_temperature: float = 1.0
    valid_fraction: float = 0.1
    split_key: str | None = None
    global_batch_size: int | None = None
    global_max_atoms: int | None = None
    global_max_edges: int | None = None
    global_max_angles: int | None = None
    max_atoms: int | None = None
    max_edges: int | None = None
    max_angles: int | None = None
    budget: Literal["given", "auto"] = "given"
    memory_gb: float | None = None
    cost_model: Literal["formula", "calibrated"] = "formula"
    num_workers: int = 0
    cache_dir: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virials_key: str | None = None
    magmoms_key: str | None = None
    stress_unit: Literal["eV/A^3", "GPa", "kbar-vasp"] = "eV/A^3"
    reference_energies: str | None = None
    energy_scale: float | Literal["rms_forces"] = "rms_forces"

    def __post_init__(self) -> None:
        _check_at_least("data.num_workers", self.num_workers, 0)
        limits = ("max_atoms", "max_edges", "max_angles")
        for name in ("global_batch_size", *limits, *(f"global_{limit}" for limit in limits)):
            if (value := getattr(self, name)) is not None:
                _check_at_least(f"data.{name}", value, 1)
        if self.memory_gb is not None and not 0.0 < self.memory_gb < float("inf"):
            raise ValueError(f"data.memory_gb is {self.memory_gb}: it must be positive")
        if self.memory_gb is not None and self.budget != "auto":
            raise ValueError(
                f"data.memory_gb is {self.memory_gb}, but data.budget is {self.budget}, so it has no effect: give "
                "data.budget auto, or leave it out"
            )
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(
                f"data.valid_fraction is {self.valid_fraction}: it must be at least 0 (no validation) and below 1"
            )
        if self.valid and self.valid_fraction not in (0.0, DataConfig.valid_fraction):
            raise ValueError(
                f"data.valid_fraction is {self.valid_fraction}, and data.valid names files: give one of them"
            )
        if self.split_key is not None and (self.valid or not self.valid_fraction):
            raise ValueError(
                f"data.split_key is {self.split_key!r}, but nothing is split: "
                f"{'data.valid names files' if self.valid else 'data.valid_fraction is 0'}; leave it out"
            )
        if self.global_batch_size is not None and self.has_global_budget:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size} beside data.global_max_atoms, global_max_edges or "
                "global_max_angles: an update has either a number of structures or a budget; leave one of them out"
            )
        if not isinstance(self.energy_scale, str) and not self.energy_scale > 0.0:
            raise ValueError(f"data.energy_scale is {self.energy_scale} eV: it must be positive")
        _check_reference_energies("data.reference_energies", self.reference_energies)
        self._check_tasks()

    def _check_tasks(self) -> None:
        if not self.task_temperature > 0.0:
            raise ValueError(f"data.task_temperature is {self.task_temperature}: it must be positive")
        if not self.tasks:
            if self.task_temperature != DataConfig.task_temperature:
                raise ValueError(f"data.task_temperature is {self.task_temperature}, but there are no data.tasks")
            return
        if len(self.tasks) == 1 and (self.tasks[0].weight != 1.0 or self.task_temperature != 1.0):
            raise ValueError(
                f"data.tasks[{self.tasks[0].name}].weight is {self.tasks[0].weight} and data.task_temperature is "
                f"{self.task_temperature}, but there is no other task to draw less of: leave them out"
            )
        if self.train or self.valid or self.test:
            raise ValueError(
                "data.tasks is given beside data.train, data.valid or data.test: put the files of each level of theory "
                "into its task, or leave data.tasks out"
            )
        if all(task.valid for task in self.tasks):
            if self.valid_fraction not in (0.0, DataConfig.valid_fraction):
                raise ValueError(
                    f"data.valid_fraction is {self.valid_fraction}, and every task names files for valid: leave it out"
                )
            if self.split_key is not None:
                raise ValueError(
                    f"data.split_key is {self.split_key!r}, but nothing is split: every task names files for valid; "
                    "leave it out"
                )
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"data.tasks has names {', '.join(names)}: each task needs one of its own")
        seen: dict[str, str] = {}
        for task in self.tasks:
            for split in ("train", "valid", "test"):
                for path in getattr(task, split):
                    place, real = f"data.tasks[{task.name}].{split}", os.path.realpath(path)
                    if real in seen:
                        raise ValueError(
                            f"{path} is in {seen[real]} and in {place}: a file has one level of theory, once, and what "
                            "is learned is no test of it"
                        )
                    seen[real] = place

    @property
    def has_global_budget(self) -> bool:
        """Whether an update takes as many structures as fit into a budget."""
        return (self.global_max_atoms, self.global_max_edges, self.global_max_angles) != (None, None, None)

    @property
    def structures_per_update(self) -> int | None:
        """Size of the global batch; None with a global budget."""
        return None if self.has_global_budget else self.global_batch_size or DEFAULT_BATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. One iteration is one update with a global batch.

    Attributes:
        lr: largest learning rate.
        min_lr: learning rate at the end of the decay.
        lr_decay_style: `cosine`; `WSD`: constant, then 1 - sqrt over the last `lr_wsd_decay_iters`; or `constant`.
        lr_warmup_iters: iterations over which the learning rate rises linearly; by default a twentieth of the run.
        lr_wsd_decay_iters: length of WSD's decay, in iterations.
        weight_decay: decoupled weight decay.
        decay_1d: let biases, norms and basis frequencies decay too; otherwise only parameters of two or more dimensions
            do (matrices, gates of shape (1, width), the embedding table).
        adam_beta1: decay rate of the mean gradient.
        adam_beta2: decay rate of the mean squared gradient.
        adam_eps: added to the root of the mean squared gradient.
        clip_grad: largest 2-norm of the gradient of the global batch; 0 clips nothing.
        ema_decay: decay of the averaged weights, which are evaluated and exported; 0 averages nothing.
        backend: whose fused AdamW: `torch`, `apex` (NVIDIA apex) or `te` (NVIDIA transformer-engine), the latter two on
            CUDA in fp32 only; `auto`: te, apex or torch, the first that is there and can. Checkpoints are the same.
    """

    lr: float = 1e-3
    min_lr: float = 1e-6
    lr_decay_style: Literal["cosine", "WSD", "constant"] = "cosine"
    lr_warmup_iters: int | None = None
    lr_wsd_decay_iters: int = 0
    weight_decay: float = 1e-2
    decay_1d: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 0.5
    ema_decay: float = 0.999
    backend: Literal["auto", "torch", "apex", "te"] = "auto"

    def __post_init__(self) -> None:
        for name in ("lr", "adam_eps"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it must be positive")
        for name in ("min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "lr_wsd_decay_iters"):
            if (value := getattr(self, name)) is not None:
                _check_at_least(f"optim.{name}", value, 0)
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr is {self.min_lr}: it must not exceed optim.lr ({self.lr})")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters > 0):
            raise ValueError(
                f"optim.lr_decay_style is {self.lr_decay_style} with optim.lr_wsd_decay_iters "
                f"{self.lr_wsd_decay_iters}: WSD needs a positive decay length, the other styles take none"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, rhythm and place of a run.

    Attributes:
        output: run directory.
        train_iters: updates in all; give this or `train_epochs`.
        train_epochs: passes over the training data.
        eval_interval: updates between evaluations of the averaged weights; by default one epoch.
        save_interval: updates between checkpoints; by default `eval_interval`.
        log_interval: updates between records in log.csv and TensorBoard.
        keep_last: checkpoints kept, beside the one of the best evaluation.
        keep_every: keep the checkpoints of all multiples of so many updates as well; 0 for none.
        async_save: go on training while a checkpoint is written; costs memory of the host for a copy of what each rank
            writes.
        precision: `fp32`; `tf32` (CUDA only) and `bf16-mixed` form matrix products in that format, geometry, reductions
            and loss stay in at least fp32; `fp64`.
        kernels: for chains of element-wise operations, norms and sums over edges. `torch` runs operation by operation;
            `compiled` fuses the chains with torch.compile, which takes up to a minute at the start of a run and saves
            about a fifth of a step, and needs a C++ compiler (CPU) or Triton (CUDA); `native` takes kernels of our own
            in C++, for CPUs only and the fastest there, compiled in seconds at the first start (needs a C++ compiler);
            `triton` takes kernels of our own for GPUs only, which were tested through Triton's interpreter, not on a
            GPU. Each kernel is compared with torch at its first call; a difference stops the run.
        compile: `blocks` compiles all passes of an interaction block, from forward to second backward, into a few
            kernels with torch's inductor, once for all sizes of batches: fewer operations, for some minutes at the
            first start (later ones find kernels on disk, and trace for one); on a CPU `native` kernels are faster.
            Programs are compared with the plain block before use; a difference stops the run, or with `try` leaves it
            plain, with a warning. Of blocks with experts the atom attention stays as it is, and so does all outside of
            blocks, for which `kernels` and `recompute` hold. With replicas, sharded weights and experts over ranks;
            needs torch 2.8 and a C++ compiler (CPU) or Triton (CUDA).
        recompute: `selective` makes large results of element-wise operations (2 MiB and more) again in backward passes
            instead of keeping them, in the force pass and in the second backward pass alike: the same bits with less
            memory; `all` those of any size, `none` keeps them. `full` keeps of an interaction block only its inputs and
            what arrives at it in each backward pass, and computes twice as many matrix products in all. `auto`, with
            `data.budget` auto and `data.memory_gb`, takes the first of none, selective, all and full with which the
            largest structure fits.
        seed: of the initial weights, the shuffling and the validation split.
        device: `auto` (a GPU per rank where there are GPUs), `cpu` or `cuda`.
        resume: `auto` continues from the newest valid checkpoint in `output`, `never` refuses an `output` with
            checkpoints, else the path of a checkpoint to begin with.
        wandb_project: also log to this Weights & Biases project (extra `wandb`).
        peak_tflops: TFLOP/s of matrix products that one rank's device reaches at best, which the log's `mfu` is a share
            of; by default that of a known GPU, and on CPU what a large product reaches at the start of the run.
    """

    output: str = "runs/matris"
    train_iters: int | None = None
    train_epochs: int | None = None
    eval_interval: int | None = None
    save_interval: int | None = None
    log_interval: int = 10
    keep_last: int = 2
    keep_every: int = 0
    async_save: bool = True
    precision: Literal["fp32", "tf32", "bf16-mixed", "fp64"] = "fp32"
    kernels: Literal["torch", "compiled", "native", "triton"] = "torch"
    compile: Literal["none", "blocks", "try"] = "none"
    recompute: Literal["none", "selective", "all", "full", "auto"] = "selective"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: str = "auto"
    wandb_project: str | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        if (self.train_iters is None) == (self.train_epochs is None):
            raise ValueError(
                f"training.train_iters is {self.train_iters} and training.train_epochs is {self.train_epochs}: "
                "give exactly one of them"
            )
        for name in ("train_iters", "train_epochs", "eval_interval", "save_interval", "log_interval", "keep_last"):
            if (value := getattr(self, name)) is not None:
                _check_at_least(f"training.{name}", value, 1)
        for name in ("keep_every", "seed"):
            _check_at_least(f"training.{name}", getattr(self, name), 0)
        if self.peak_tflops is not None and not self.peak_tflops > 0.0:
            raise ValueError(f"training.peak_tflops is {self.peak_tflops}: it must be positive")
        if self.compile != "none" and self.recompute == "full":
            raise ValueError(
                f"training.recompute is full and training.compile is {self.compile}: programs decide what is kept of a "
                "compiled block; take training.recompute selective"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes of the rank grid. All other ranks are data-parallel replicas.

    Attributes:
        tensor_model_parallel_size: ranks that share each matrix product; must divide the width of the features.
        context_parallel_size: ranks that share the atoms of the same structures (graph parallelism).
        fully_sharded_size: ranks that share parameters, gradients and optimizer state, each with its own structures.
        sharding_policy: when the full weights of a block exist, with `fully_sharded_size` above 1: `regather` gathers
            them for each pass and frees them (ZeRO-3), `keep` holds them from the forward pass to the update (ZeRO-2).
        graph_partitioner: who owns which atom: `morton` (along a space-filling curve), `index` (as in the file) or
            `balanced` (largest cost in edges and angles first).
        expert_model_parallel_size: ranks that share the experts, of those that share no matrix product: replicas,
            shards and parts of graphs alike.
        expert_placement: where experts are, with `expert_model_parallel_size` above 1: `sharded` (every rank holds a
            piece of each, and gathers those that the plan of the micro-batch gives it) or `fixed` (whole experts on
            home ranks; their number must divide).
        expert_fp16_wire: send tokens to their experts and back in fp16, with a scale for each element, and compute in
            fp32: half the bytes, for some 1e-4 of the size of forces and weight gradients (docs/benchmarks.md); not
            with `training.precision` fp64.
        pipeline_model_parallel_size: ranks that share the layers; only 1 is supported.
        distributed_timeout_minutes: how long a rank waits for the others before it ends the run and says which did not
            come.
    """

    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    fully_sharded_size: int = 1
    sharding_policy: Literal["regather", "keep"] = "regather"
    graph_partitioner: Literal["morton", "index", "balanced"] = "morton"
    expert_model_parallel_size: int = 1
    expert_placement: Literal["sharded", "fixed"] = "sharded"
    expert_fp16_wire: bool = False
    pipeline_model_parallel_size: int = 1
    distributed_timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        for axis in ("tensor_model_parallel", "context_parallel", "fully_sharded", "expert_model_parallel"):
            _check_at_least(f"parallel.{axis}_size", getattr(self, f"{axis}_size"), 1)
        if self.pipeline_model_parallel_size != 1:
            raise ValueError(
                f"parallel.pipeline_model_parallel_size is {self.pipeline_model_parallel_size}: this version supports "
                "only 1"
            )
        if not self.distributed_timeout_minutes > 0.0:
            raise ValueError(
                f"parallel.distributed_timeout_minutes is {self.distributed_timeout_minutes}: it must be positive"
            )

    def refuse_idle(self) -> None:
        """A run has one layout, in which every option must act.

        Raises:
            ValueError: an option that is not at its default belongs to an axis of one rank.
        """
        for name, axis in (
            ("sharding_policy", "fully_sharded_size"),
            ("graph_partitioner", "context_parallel_size"),
            ("expert_placement", "expert_model_parallel_size"),
            ("expert_fp16_wire", "expert_model_parallel_size"),
        ):
            value = getattr(self, name)
            if value != getattr(ParallelConfig, name) and getattr(self, axis) == 1:
                raise ValueError(
                    f"parallel.{name} is {value}, but parallel.{axis} is 1, so it has no effect: leave it out, or "
                    f"choose a larger {axis}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: what to learn from.
        training: length, rhythm and place.
        model: hyper-parameters; with `init_from` those of the base model.
        loss: what to minimise.
        optim: how.
        parallel: over which ranks.
        init_from: model directory to fine-tune; its predictions are verified before the first update.
        dry_run: build everything, print what the run would be, write nothing.
        given_model: names of the hyper-parameters that were asked for, also those with their default value; no setting
            itself.
    """

    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: str | None = None
    dry_run: bool = False
    given_model: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        data = self.data
        if not data.train and not data.tasks:
            raise ValueError("data.train is empty: give at least one file, --data.train FILE (or data.tasks)")
        sources = (data.reference_energies, *(task.reference_energies for task in data.tasks))
        if "base" in sources and not self.init_from:
            raise ValueError("data.reference_energies is base, but there is no base model: give --init_from DIR")
        if self.model.tasks or self.model.charge_tasks or self.model.spin_tasks:
            raise ValueError("model.tasks follows from data.tasks: leave it out")
        if self.parallel.expert_fp16_wire and self.training.precision == "fp64":
            raise ValueError(
                "parallel.expert_fp16_wire with training.precision fp64: what travels in fp16 keeps 11 bits; leave it "
                "out, or choose fp32"
            )
        if self.training.recompute == "auto" and (data.budget != "auto" or data.memory_gb is None):
            raise ValueError(
                f"training.recompute is auto, data.budget is {data.budget} and data.memory_gb is {data.memory_gb}: "
                "what fits is known for data.budget auto with data.memory_gb, the GB that each rank may use; give "
                "both, or one of the policies none, selective, all and full"
            )
        if data.budget == "auto" and self.training.compile != "none":
            raise ValueError(
                f"data.budget is auto and training.compile is {self.training.compile}: the memory of compiled blocks "
                "is not predicted; give data.max_atoms, data.max_edges or data.max_angles, or compile nothing"
            )
        if self.init_from and self.data.energy_scale != "rms_forces":
            raise ValueError(
                f"data.energy_scale is {self.data.energy_scale} with init_from: fine-tuning keeps the scale of the "
                "base model; leave the option out"
            )


def to_plain(value: Any) -> Any:
    """Settings as JSON- and YAML-ready values: dataclasses as dictionaries, enums by value, tuples as lists."""
    if isinstance(value, ModelConfig):
        return value.to_dict()
    if is_dataclass(value):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value) if entry.compare}
    if isinstance(value, Enum):
        return value.value
    return [to_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _check_reference_energies(name: str, value: str | None) -> None:
    if value not in (None, "fit", "none", "isolated", "base") and not str(value).endswith(".json"):
        raise ValueError(f"{name} is {value!r}: allowed are fit, none, isolated, base, or the path of a .json file")


def _check_at_least(name: str, value: float, smallest: int) -> None:
    if not value >= smallest:
        raise ValueError(f"{name} is {value}: it must be at least {smallest}")
