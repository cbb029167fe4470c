"""The recipes: phase 1, mining and phase 2 (`lego`), both exits at once (`joint`), and dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lego.config import ModelConfig, TrainConfig
from lego.model import LegoModel
from lego.seeding import generator
from lego.training.gate import fit_gate
from lego.training.loop import Evaluation, Watcher, fit
from lego.training.mining import mine_hard_tokens
from lego.training.objectives import (
    Objective,
    exit_objective,
    hard_token_objective,
    joint_objective,
)
from lego.training.windows import Windows

# takes the name of a phase, gives what watches it
Watch = Callable[[str], Watcher]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, the losses by phase, and the confidence below which a token is hard."""

    model: LegoModel
    history: dict[str, list[Evaluation]]
    hard_threshold: float


class Phases:
    """Runs named phases on the same windows and keeps their losses.

    The state of phase NAME is saved in folder/NAME.safetensors; a whole one is not repeated.
    """

    def __init__(self, windows: Windows, config: TrainConfig, folder: Path, watch: Watch) -> None:
        self.windows, self.config, self.folder, self.watch = windows, config, folder, watch
        self.history: dict[str, list[Evaluation]] = {}

    def run(
        self,
        name: str,
        model: LegoModel,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective,
    ) -> None:
        with _gradients_for(model, parameters):
            progress = fit(
                parameters,
                objective,
                self.windows,
                self.config,
                state_path=self.folder / f"{name}.safetensors",
                watcher=self.watch(name),
            )
        self.history[name] = progress.history


@contextmanager
def _gradients_for(model: nn.Module, trained: Collection[str]) -> Iterator[None]:
    """Gradients for the parameters of these names alone: that of a frozen head is not cheap."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def train_lego(
    config: ModelConfig, train: TrainConfig, windows: Windows, folder: Path, watch: Watch
) -> Trained:
    """Train both blocks by train.recipe, then fit the gate.

    Phase 1 does not depend on upper_kv: two models that differ in nothing else share it through a
    common folder.
    """
    model, phases = new_model(config, train.seed), Phases(windows, train, folder, watch)
    lower, upper = model.lower_parameters(), model.upper_parameters()
    if train.recipe == "joint":
        objective = joint_objective(model, windows, train)
        phases.run(f"joint_{config.upper_kv}", model, lower | upper, objective)
    else:
        phases.run("phase1", model, lower, exit_objective(model, windows))
    hard = mine_hard_tokens(model, windows, train.hard_example_ratio, batch_size=train.batch_size)
    if train.recipe == "lego":
        # phase 2 starts where phase 1 ended: residual branches are small at first
        model.final_norm.load_state_dict(model.exit_norm.state_dict())
        objective = hard_token_objective(model, windows, hard.mask)
        phases.run(f"phase2_{config.upper_kv}", model, upper, objective)
    fit_gate(model, windows, batch_size=train.batch_size)
    return Trained(model=model.eval(), history=phases.history, hard_threshold=hard.threshold)


def train_dense(
    config: ModelConfig,
    num_layers: int,
    train: TrainConfig,
    windows: Windows,
    folder: Path,
    watch: Watch,
) -> LegoModel:
    """A dense baseline of num_layers layers, trained on the same windows.

    It makes as many passes over them as both phases of recipe `lego` together.
    """
    if train.recipe == "lego":
        train = replace(train, epochs=2 * train.epochs)
    model = new_model(config.dense(num_layers), train.seed)
    phases = Phases(windows, train, folder, watch)
    parameters = dict(model.named_parameters())
    phases.run(f"dense_{num_layers}", model, parameters, exit_objective(model, windows))
    return model.eval()


def new_model(config: ModelConfig, seed: int) -> LegoModel:
    """A freshly initialised model; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed).initial_seed())
        return LegoModel(config)
