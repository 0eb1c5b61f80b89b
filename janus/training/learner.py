"""Everything that an update changes: weights, optimizer state, average, step count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from janus.checkpoint import Checkpoint, CheckpointError
from janus.checkpoint.shards import Shards
from janus.comm.collectives import gather_objects
from janus.mesh import Mesh
from janus.optim import (
    MOMENTS,
    AdamWConfig,
    Backend,
    ExponentialMovingAverage,
    Schedule,
    build_adamw,
    choose_backend,
    clip_gradients,
    moments_of,
    restart,
)
from janus.sharding import Policy, Weights


class Learner:
    """A model with what updates it. Each rank updates and averages what it holds of the weights.

    Args:
        model: its trainable parameters are updated.
        adamw, schedule: how.
        ema_decay: of the averaged weights, see `ExponentialMovingAverage`.
        clip_grad: largest 2-norm of the gradient of the global batch; 0 clips nothing.
        mesh, units, experts, policy: how the ranks share the weights, see `Weights`.

    Attributes:
        weights: what this rank holds of the weights.
        parameters: its `pieces`.
        step: number of updates done.
    """

    def __init__(
        self,
        model: nn.Module,
        adamw: AdamWConfig,
        schedule: Schedule,
        *,
        ema_decay: float,
        clip_grad: float,
        mesh: Mesh,
        units: Sequence[nn.Module] | None = None,
        experts: Sequence[nn.Module] = (),
        policy: Policy = "regather",
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.clip_grad = clip_grad
        self.weights = Weights(model, mesh, units=units, experts=experts, policy=policy)
        self.parameters = self.weights.pieces
        adamw = replace(adamw, backend=_common_backend(adamw.backend, self.parameters.values(), mesh))
        # One for each group, so that a group can be updated before the others.
        self._optimizers = [build_adamw(group, adamw, ndims=self.weights.ndims) for group in self.weights.groups]
        self._updated: set[int] = set()  # of the groups, before the update of all
        self.ema = ExponentialMovingAverage(self.parameters, ema_decay)
        self.step = 0

    @property
    def optimizer_library(self) -> str:
        """Whose kernels update the weights: `torch`, `apex`, `transformer_engine`."""
        return type(self._optimizers[0]).__module__.partition(".")[0]

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.schedule.rate(self.step)

    def zero_gradients(self) -> None:
        """Forgets all gradients."""
        self.weights.zero_gradients()

    def sum_gradients(self) -> None:
        """Sums the gradients over ranks. All of them call it."""
        self.weights.sum_gradients()

    def clip(self) -> float:
        """Clips the gradients, which must be summed over ranks. Returns the norm they had."""
        return float(clip_gradients(self.parameters.values(), self.clip_grad, norm=self.weights.gradient_norm()))

    @property
    def updates_early(self) -> bool:
        """Whether units of sharded weights are updated during the backward pass, each as soon as its gradient is there.

        Without clipping only, which needs the norm of all gradients first, and without replicas of a shard, which may
        have other numbers of micro-batches: they sum their gradients at the end.
        """
        return self.clip_grad == 0 and self.weights.passes is not None and not self.weights.has_replicas

    def update_early(self, group: Mapping[str, nn.Parameter]) -> None:
        """The optimizer step of one of `weights.groups`, whose gradient is summed over the ranks; `update` follows."""
        self._update(next(index for index, other in enumerate(self.weights.groups) if other is group))

    def update(self) -> None:
        """One optimizer step with the gradients that are there, for all that is not updated yet; then the average."""
        for index in range(len(self._optimizers)):
            if index not in self._updated:
                self._update(index)
        self._updated.clear()
        self.weights.changed()
        self.step += 1
        self.ema.update(self.step)

    def _update(self, index: int) -> None:
        optimizer = self._optimizers[index]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        optimizer.step()
        self._updated.add(index)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights inside of the block."""
        try:
            with self.ema.applied():
                self.weights.changed()
                yield
        finally:
            self.weights.changed()

    def broadcast(self) -> None:
        """Gives all ranks the weights of the first that holds them. All ranks call it."""
        self.weights.broadcast()

    # Logical tensors: all ranks call these, and get the same ---------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """State dict of the model, whole."""
        return self.weights.state()

    def gather_parameters(self) -> dict[str, Tensor]:
        """Trainable parameters, whole."""
        return self.weights.gather({name: piece.detach() for name, piece in self.parameters.items()})

    def gather_gradients(self) -> dict[str, Tensor]:
        """Gradients of the trainable parameters after `sum_gradients`, whole."""
        gradients = {name: piece.grad for name, piece in self.parameters.items()}
        return self.weights.gather({name: grad for name, grad in gradients.items() if grad is not None})

    def gather_average(self) -> dict[str, Tensor]:
        """Averages of the trainable parameters, whole."""
        return self.weights.gather(self.ema.average)

    # Checkpoints: logical tensors in pieces, each rank for itself ----------------------------------------------------

    def held(self) -> dict[str, dict[str, Tensor]]:
        """What this rank holds of all tensors of the state: by kind, then by name."""
        held = {"model": self.weights.held_state(), "ema": self.ema.average}
        if self.step > 0:
            state = self._optimizer_state()
            for moment in MOMENTS:
                held[f"optimizer/{moment}"] = {name: state[piece][moment] for name, piece in self.parameters.items()}
        return held

    def shards(self) -> dict[str, Shards]:
        """What this rank is to save, by logical name `kind/name`: nothing depends on ranks or on the order of
        parameters. The optimizer's step counts are not among it, for every update is one of every parameter."""
        return {
            f"{kind}/{name}": shards
            for kind, held in self.held().items()
            for name, shards in self.weights.own_shards(held).items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes the state of a checkpoint, whichever layout has written it. One of no updates may lack averages, which
        then begin with its weights. Sends nothing.

        Raises:
            CheckpointError: names or shapes are not those of this model.
        """
        step = int(checkpoint.state["step"])
        names = {f"model/{name}": shape for name, shape in self.weights.shapes.items()}
        # A model that was made a checkpoint to start from has no average yet: that begins with the weights.
        averaged = step > 0 or any(name.startswith("ema/") for name in checkpoint.tensors)
        later = ("ema", *(f"optimizer/{moment}" for moment in MOMENTS if step > 0)) if averaged else ()
        for kind in later:
            names |= {f"{kind}/{name}": self.weights.shapes[name] for name in self.parameters}
        found = {name: stored.shape for name, stored in checkpoint.tensors.items()}
        if names != found:
            differing = sorted(name for name in names | found if names.get(name) != found.get(name))
            raise CheckpointError(
                f"checkpoint {checkpoint.path} is of another model: {len(differing)} tensors differ, such as "
                f"{differing[:3]}; resume with the settings of that run, or choose another output directory"
            )
        self.step = step
        for optimizer in self._optimizers:
            restart(optimizer, step)
        for kind, held in self.held().items():
            source = "model" if kind == "ema" and not averaged else kind
            checkpoint.load({f"{source}/{name}": shards for name, shards in self.weights.held_shards(held).items()})
        self.weights.changed()

    def _optimizer_state(self) -> dict[Tensor, Mapping[str, Tensor]]:
        groups = zip(self._optimizers, self.weights.groups, strict=True)
        return {piece: moments_of(optimizer, piece) for optimizer, group in groups for piece in group.values()}


def _common_backend(backend: Backend, parameters: Iterable[nn.Parameter], mesh: Mesh) -> Backend:
    """Whose kernels all ranks update with; weights that several hold would else drift apart. On CUDA all call it.

    Raises:
        ValueError: on all ranks, if one cannot have what was asked for, or `auto` finds different ones.
    """
    if backend == "torch" or mesh.device.type != "cuda":
        return choose_backend(backend, parameters)  # that of all, or an error on all
    chosen: Backend = "torch"
    fault: str | None = None
    try:
        chosen = choose_backend(backend, parameters)
    except ValueError as error:
        fault = str(error)
    found = gather_objects((chosen, fault), mesh)
    if faults := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text]:
        raise ValueError(faults[0])
    if len({name for name, _ in found}) > 1:
        ranks = {name: [rank for rank, (other, _) in enumerate(found) if other == name] for name, _ in found}
        listed = "; ".join(f"{name} on ranks {', '.join(map(str, numbers[:10]))}" for name, numbers in ranks.items())
        raise ValueError(
            f"optim.backend is auto, which finds other kernels on other ranks ({listed}): install the same everywhere, "
            "or choose torch"
        )
    return chosen
