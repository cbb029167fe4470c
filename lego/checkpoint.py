"""Checkpoint folders: config.json, model.safetensors, tokenizer.json, calibration.json.

`lego calibrate` adds certificate.json, see lego.certificate; a checkpoint saved anew has none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lego.calibration import Calibration
from lego.config import ModelConfig
from lego.files import read_json_object, replacing_folder
from lego.model import LegoModel
from lego.tokenizer import END_OF_TEXT, Tokenizer

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TOKENIZER, _CALIBRATION = "tokenizer.json", "calibration.json"
# leaves room for a format that older code must refuse
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what it takes to use it; calibration is None for a dense model."""

    model: LegoModel
    tokenizer: Tokenizer
    calibration: Calibration | None = None


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint of a run folder; `path` itself where it holds none, so may be one."""
    return path / "checkpoint" if (path / "checkpoint").is_dir() else path


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the folder `path`, all of it or nothing; an older checkpoint there is replaced.

    See replacing_folder for what a kill may leave.

    Raises: OSError if it cannot be written, for example with the disk full.
    """
    model = checkpoint.model
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    with replacing_folder(path) as folder:
        config: dict[str, Any] = {"format": _FORMAT, "model": asdict(model.config)}
        if checkpoint.tokenizer.end_of_text != END_OF_TEXT:
            config["end_of_text"] = checkpoint.tokenizer.end_of_text
        _write_json(folder / _CONFIG, config)
        (folder / _WEIGHTS).write_bytes(save(tensors))
        checkpoint.tokenizer.save(folder / _TOKENIZER)
        if checkpoint.calibration is not None:
            _write_json(folder / _CALIBRATION, asdict(checkpoint.calibration))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a folder that save_checkpoint wrote; the model is in eval mode on the CPU.

    Raises: ValueError, naming the file, if one is missing, truncated, corrupt or does not fit.
    """
    if not (path / _CONFIG).is_file():
        what = "" if path.exists() else ", which does not exist"
        raise ValueError(
            f"load_checkpoint: a checkpoint folder must hold {_CONFIG}, got {path}{what}"
        )
    config = read_json_object(path / _CONFIG, "load_checkpoint")
    if config.get("format") != _FORMAT:
        raise ValueError(
            f"load_checkpoint: {path / _CONFIG} must be of format {_FORMAT}, "
            f"got {config.get('format')}"
        )
    try:
        model = LegoModel(ModelConfig(**config["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_checkpoint: {path / _CONFIG} must be whole, got {error}") from error
    _load_weights(model, path / _WEIGHTS)
    tokenizer = Tokenizer.load(path / _TOKENIZER, str(config.get("end_of_text", END_OF_TEXT)))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"load_checkpoint: {path / _TOKENIZER} must have {model.config.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    return Checkpoint(model.eval(), tokenizer, _load_calibration(path / _CALIBRATION))


def _load_calibration(path: Path) -> Calibration | None:
    if not path.is_file():
        return None
    try:
        calibration = Calibration(**read_json_object(path, "load_checkpoint"))
        numbers = all(isinstance(value, float) for value in calibration.threshold.values())
    except (TypeError, AttributeError) as error:
        raise ValueError(f"load_checkpoint: {path} must be whole, got {error}") from error
    if not numbers:
        raise ValueError(
            f"load_checkpoint: {path} must hold thresholds, got {calibration.threshold}"
        )
    return calibration


def _load_weights(model: LegoModel, path: Path) -> None:
    try:
        tensors = load_file(path)
        if model.config.tie_embeddings:
            if "head.weight" in tensors:
                raise KeyError("head.weight, but the config ties it to the embedding")
            tensors["head.weight"] = tensors["embedding.weight"]
        model.load_state_dict(tensors)
    except (SafetensorError, FileNotFoundError, KeyError, RuntimeError) as error:
        # load_state_dict lists every key on a line of its own: the first line says enough
        reason = str(error).splitlines()[0]
        raise ValueError(f"load_checkpoint: {path} must be whole and fit, got {reason}") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
