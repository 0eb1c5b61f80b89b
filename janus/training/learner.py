"""Everything that an update changes: weights, optimizer state, average, step count."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from janus.checkpoint import CheckpointError
from janus.optim import AdamWConfig, ExponentialMovingAverage, Schedule, build_adamw, clip_gradients

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Learner:
    """A model with what updates it.

    Args:
        model: its trainable parameters are updated.
        adamw, schedule: how.
        ema_decay: of the averaged weights, see `ExponentialMovingAverage`.
        clip_grad: largest 2-norm of the gradient of the global batch; 0 clips nothing.

    Attributes:
        step: number of updates done.
    """

    def __init__(
        self, model: nn.Module, adamw: AdamWConfig, schedule: Schedule, *, ema_decay: float, clip_grad: float
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.clip_grad = clip_grad
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.optimizer = build_adamw(model, adamw)
        self.ema = ExponentialMovingAverage(model, ema_decay)
        self.step = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.schedule.rate(self.step)

    def clip(self) -> float:
        """Clips the gradients, which must be summed over ranks. Returns the norm they had."""
        return float(clip_gradients(self.parameters.values(), self.clip_grad))

    def update(self) -> None:
        """One optimizer step with the gradients that are there; then the average follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.step)

    def capture(self) -> dict[str, Tensor]:
        """All tensors of the state, by logical name: nothing depends on ranks or on the order of parameters."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.average.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Inverse of `capture`.

        Raises:
            CheckpointError: names or shapes are not those of this model.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for full_name, value in tensors.items():
            part, name = full_name.split("/", 1)
            parts[part][name] = value
        wanted = {name: value.shape for name, value in self.model.state_dict().items()}
        found = {name: value.shape for name, value in parts["model"].items()}
        if wanted != found or set(parts["ema"]) != set(self.parameters):
            differing = sorted({name for name in wanted | found if wanted.get(name) != found.get(name)})
            differing = differing or sorted(set(parts["ema"]) ^ set(self.parameters))
            raise CheckpointError(
                f"the checkpoint is of another model: {len(differing)} tensors differ, such as {differing[:3]}; "
                "resume with the settings of that run, or choose another output directory"
            )
        self.model.load_state_dict(parts["model"])
        self.ema.load(parts["ema"])
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            moments = {moment: parts["optimizer"].get(f"{moment}/{name}") for moment in _MOMENTS}
            state = {moment: value for moment, value in moments.items() if value is not None}
            # The fused optimizer keeps the step count beside its parameter, like the moments.
            self.optimizer.state[parameter] = {
                moment: value.to(parameter.device, copy=True) for moment, value in state.items()
            }
        self.step = step

    def zero_gradients(self) -> None:
        """Forgets all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
