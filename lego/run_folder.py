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
from lego.data import Corpus, prepare_corpus
from lego.files import to_json, write_text

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

    def claim(self, config: ExperimentConfig, sha256: str) -> None:
        """Make the folder for this configuration and text, or check that it is theirs.

        Raises: ValueError if it belongs to another, naming the first difference.
        """
        values = to_toml(config)
        values["data"]["sha256"] = sha256
        if not self._config_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self._config_file, tomli_w.dumps(values))
            return
        # what a folder made before a field was there lacks is its default
        saved = to_toml(self.config())
        saved["data"]["sha256"] = self._read()["data"]["sha256"]
        for section in values:
            for name in sorted(values[section].keys() | saved[section].keys()):
                ours, theirs = values[section].get(name), saved[section].get(name)
                if ours != theirs:
                    raise ValueError(
                        f"run folder: {self.path} must have been made with {section}.{name} = "
                        f"{ours}, got {theirs}; choose another --out"
                    )

    def config(self) -> ExperimentConfig:
        """The configuration in config.toml; ValueError if it is missing or not one."""
        values = self._read()
        del values["data"]["sha256"]
        if "data_dir" in values["data"]:
            values["data"]["data_dir"] = Path(values["data"]["data_dir"])
        try:
            sections = {name: make(**values[name]) for name, make in _SECTIONS.items()}
            return ExperimentConfig(**sections)
        except (TypeError, ValueError) as error:
            raise self._unreadable(self._config_file, error) from error

    def corpus(self) -> Corpus:
        """The corpus that the run was made with; ValueError if its text has changed since."""
        corpus, sha256 = prepare_corpus(self.config().data), self._read()["data"]["sha256"]
        if corpus.sha256 != sha256:
            raise ValueError(
                f"run folder: the text {corpus.name} of {self.path} must have SHA-256 {sha256}, "
                f"got {corpus.sha256}"
            )
        return corpus

    def results(self) -> dict[str, Any] | None:
        """What results.json holds; None while the run is not done."""
        file = self.path / "results.json"
        if not file.is_file():
            return None
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._unreadable(file, error) from error
        if not isinstance(results, dict):
            raise self._unreadable(file, "no object")
        return results

    def write_results(self, results: dict[str, Any]) -> None:
        write_text(self.path / "results.json", to_json(results))

    @property
    def _config_file(self) -> Path:
        return self.path / "config.toml"

    def _read(self) -> dict[str, dict[str, Any]]:
        """config.toml with all its sections and the hash of the text."""
        if not self._config_file.is_file():
            raise ValueError(
                f"run folder: must hold config.toml, got {self.path}{self._what_it_is()}"
            )
        try:
            values = tomllib.loads(self._config_file.read_text(encoding="utf-8"))
            sections = {name: dict(values[name]) for name in _SECTIONS}
            sections["data"]["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._unreadable(self._config_file, error) from error
        return sections

    def _what_it_is(self) -> str:
        """Why a folder that is no run folder was given, where that is plain."""
        if not self.path.exists():
            return ", which does not exist"
        is_checkpoint = (self.path / "model.safetensors").is_file()
        return ", a checkpoint: generate and export take one" if is_checkpoint else ""

    def _unreadable(self, file: Path, reason: object) -> ValueError:
        return ValueError(f"run folder: {file} must be as `lego` wrote it, got {reason}")


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
