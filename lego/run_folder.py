"""A run's folder: its configuration, which never changes, and its results.

config.toml, training/ (phase states), events/ (TensorBoard), checkpoint/, baselines/,
results.json, loss.svg, confidence.svg, cost.svg, sample.txt.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lego.config import (
    DataConfig,
    ExitConfig,
    ExperimentConfig,
    ModelConfig,
    TimingConfig,
    TrainConfig,
)
from lego.files import write_text

_SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "exit": ExitConfig,
    "timing": TimingConfig,
}


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def claim(self, config: ExperimentConfig) -> None:
        """Make the folder for this configuration, or check that it was made for it.

        Raises: ValueError if it belongs to another configuration, naming the first difference.
        """
        values = to_toml(config)
        file = self.path / "config.toml"
        if not file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(file, tomli_w.dumps(values))
            return
        saved = to_toml(self.config())
        for section in values:
            for name in values[section].keys() | saved[section].keys():
                ours, theirs = values[section].get(name), saved[section].get(name)
                if ours != theirs:
                    raise ValueError(
                        f"run folder: {self.path} must have been made with {section}.{name} = "
                        f"{ours}, got {theirs}; choose another --out"
                    )

    def config(self) -> ExperimentConfig:
        """The configuration in config.toml; ValueError if it is missing or not one."""
        file = self.path / "config.toml"
        if not file.is_file():
            raise ValueError(f"run folder: must hold config.toml, got {self.path}")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
            sections = {name: make(**values[name]) for name, make in _SECTIONS.items()}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"run folder: {file} must be a configuration, got {error}") from error
        return ExperimentConfig(**sections)

    def results(self) -> dict[str, Any] | None:
        """What results.json holds; None while the run is not done."""
        file = self.path / "results.json"
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"run folder: {file} must be JSON, got {error}") from error

    def write_results(self, results: dict[str, Any]) -> None:
        write_text(self.path / "results.json", json.dumps(results, indent=2) + "\n")


def to_toml(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Plain values by section; None, which TOML lacks, is left out and is every default of it."""
    return {
        section: {
            name: str(value) if isinstance(value, Path) else value
            for name, value in values.items()
            if value is not None
        }
        for section, values in asdict(config).items()
    }
