"""The training loop: minimise an objective, stop early, survive a kill at any step.

A step depends on the configuration and the step number alone (data order, layer dropout, learning
rate), so going on from a saved state repeats the very steps that a kill cut off, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lego.config import TrainConfig
from lego.files import replacing_file
from lego.training.objectives import Objective
from lego.training.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean losses in nats after `step` steps: over the steps since the last one, and held out."""

    step: int
    train_loss: float
    holdout_loss: float


@dataclass
class Progress:
    """Where a phase stands; everything but the tensors that a resume needs."""

    step: int = 0
    done: bool = False
    best_loss: float = math.inf
    best_step: int = 0
    bad_evaluations: int = 0
    loss_sum: float = 0.0  # over the steps since the last evaluation
    loss_steps: int = 0
    history: list[Evaluation] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        values = json.loads(text)
        history = [Evaluation(**evaluation) for evaluation in values.pop("history")]
        return cls(**values, history=history)


class Watcher(Protocol):
    """Is told how a phase goes; may draw it, log it, or stop the process."""

    def started(self, total_steps: int, step: int) -> None: ...
    def stepped(self, step: int, loss: float, tokens: int) -> None: ...
    def evaluated(self, evaluation: Evaluation) -> None: ...
    def finished(self, progress: Progress) -> None: ...


def fit(
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    windows: Windows,
    config: TrainConfig,
    *,
    state_path: Path,
    watcher: Watcher,
) -> Progress:
    """Train `parameters` until early stopping or config.epochs, then set them to their best values.

    The state is saved to state_path (safetensors) every config.checkpoint_seconds and at the end;
    if it exists, training goes on from there, and a finished phase only loads its result.
    Raises: ValueError if the state is corrupt or belongs to other parameters; FloatingPointError if
    the loss stops being finite.
    """
    return _Trainer(parameters, objective, windows, config, state_path, watcher).run()


class _Trainer:
    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective,
        windows: Windows,
        config: TrainConfig,
        state_path: Path,
        watcher: Watcher,
    ) -> None:
        self.parameters, self.objective, self.windows = dict(parameters), objective, windows
        self.config, self.state_path, self.watcher = config, state_path, watcher
        self.progress = Progress()
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps_per_epoch = math.ceil(windows.num_train / config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = _adamw(self.parameters, config)
        if state_path.exists():
            self._load()

    def run(self) -> Progress:
        progress, config = self.progress, self.config
        self.watcher.started(self.total_steps, progress.step)
        if progress.step == 0:
            # a phase that starts from another one must not end worse than it began
            progress.best_loss = self._holdout_loss()
        schedule = LambdaLR(self.optimizer, self._learning_rate_factor, progress.step - 1)
        evaluate_every = math.ceil(self.steps_per_epoch / config.evals_per_epoch)
        saved_at = time.monotonic()
        order, order_epoch = torch.empty(0, dtype=torch.int64), -1
        while not progress.done:
            epoch, batch = divmod(progress.step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.windows.epoch_order(config.seed, epoch), epoch
            index = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            self._step(index)
            schedule.step()
            last = progress.step == self.total_steps
            if last or progress.step % evaluate_every == 0:
                self._evaluate()
                progress.done = last or progress.bad_evaluations >= config.patience
            if progress.done or time.monotonic() - saved_at > config.checkpoint_seconds:
                self._save()
                saved_at = time.monotonic()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        self.watcher.finished(progress)
        return progress

    def _step(self, index: Tensor) -> None:
        progress = self.progress
        loss_sum, num_tokens = self._objective(index, progress.step)
        loss = loss_sum / max(num_tokens, 1)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"fit: loss must be finite, got {value} at {progress.step}")
        progress.loss_sum += value
        progress.loss_steps += 1
        self.watcher.stepped(progress.step, value, index.numel() * self.windows.seq_len)

    def _holdout_loss(self) -> float:
        total, count = 0.0, 0
        held_out = torch.arange(self.windows.num_train, self.windows.num_windows)
        with torch.no_grad():
            for index in held_out.split(self.config.batch_size):
                loss_sum, num_tokens = self._objective(index, None)
                total, count = total + float(loss_sum), count + num_tokens
        loss = total / max(count, 1)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"fit: held-out loss must be finite, got {loss} at {self.progress.step}"
            )
        return loss

    def _evaluate(self) -> None:
        progress = self.progress
        evaluation = Evaluation(
            step=progress.step,
            train_loss=progress.loss_sum / progress.loss_steps,
            holdout_loss=self._holdout_loss(),
        )
        progress.history.append(evaluation)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if evaluation.holdout_loss < progress.best_loss:
            progress.best_loss, progress.best_step = evaluation.holdout_loss, progress.step
            progress.bad_evaluations = 0
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        else:
            progress.bad_evaluations += 1
        self.watcher.evaluated(evaluation)

    def _objective(self, index: Tensor, step: int | None) -> tuple[Tensor, int]:
        device = next(iter(self.parameters.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.bf16):
            return self.objective(index, step)

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        warmup = min(self.config.warmup_steps, self.total_steps // 4)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.total_steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _save(self) -> None:
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        if not self.progress.done:
            for name, parameter in self.parameters.items():
                tensors[f"now.{name}"] = parameter.detach()
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"adam.{key}.{name}"] = value
        metadata = {"progress": json.dumps(asdict(self.progress))}
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(self.state_path) as file:
            file.write(save(tensors, metadata))

    def _load(self) -> None:
        try:
            tensors = load_file(self.state_path)
            with safe_open(self.state_path, framework="pt") as file:
                self.progress = Progress.from_json(file.metadata()["progress"])
            for name, parameter in self.parameters.items():
                best = tensors[f"best.{name}"]
                if best.shape != parameter.shape:
                    raise KeyError(f"{name} of shape {tuple(parameter.shape)}")
                self.best[name] = best.to(parameter)
                if not self.progress.done:
                    self._load_parameter(name, parameter, tensors)
        except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"fit: training state must be whole and of this model, got {self.state_path} "
                f"({error!r}); delete it to train the phase again"
            ) from error

    def _load_parameter(
        self, name: str, parameter: nn.Parameter, tensors: dict[str, Tensor]
    ) -> None:
        with torch.no_grad():
            parameter.copy_(tensors[f"now.{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"adam.step.{name}" in tensors:  # absent while layer dropout kept skipping it
            self.optimizer.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device) for key in keys
            }


def _adamw(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    for group in groups:
        group["initial_lr"] = config.learning_rate
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
