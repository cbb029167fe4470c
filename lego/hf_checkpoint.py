"""`lego export` and `lego import`: checkpoint folders to and from those of transformers.

What transformers has no place for is in the folder `lego` of an export: exit.json (exit layer,
calibration) and exit.safetensors (exit norm, gate). Loaders take the top of a folder alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import tyro
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lego.calibration import Calibration
from lego.checkpoint import Checkpoint, checkpoint_folder, load_checkpoint, save_checkpoint
from lego.config import ModelConfig
from lego.files import read_json_object, replacing_folder, to_json
from lego.hf_format import (
    ARCHITECTURES,
    EXIT_TENSORS,
    from_hf_config,
    from_hf_tensors,
    model_type,
    to_hf_config,
    to_hf_tensors,
)
from lego.layers import Rotary
from lego.model import LegoModel
from lego.tokenizer import END_OF_TEXT, Tokenizer

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_EXIT, _EXIT_TENSORS = Path("lego") / "exit.json", Path("lego") / "exit.safetensors"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model as a folder that transformers loads without our code.

    Attributes:
        run: Folder of the run, or of a checkpoint.
        out: The new folder.
        format: hf is Hugging Face: config.json, model.safetensors, tokenizer.
        json: Print what was written, as JSON, to stdout and nothing else.
    """

    run: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    format: Literal["hf"] = "hf"
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a checkpoint of a transformers folder of the Llama family, with an exit of its own.

    Attributes:
        folder: config.json, model.safetensors (or its shards) and tokenizer.json.
        out: The new checkpoint folder.
        exit_layer: Layers of the lower block; as exported if None.
        json: Print what was written, as JSON, to stdout and nothing else.
    """

    folder: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    exit_layer: int | None = None
    json: bool = False


def export_checkpoint(options: Export, console: Console) -> dict[str, Any]:
    """`lego export`: all of the folder or nothing.

    Raises: ValueError, before anything is written, if `out` is not free, or if the upper block
        takes keys and values from the exit state, which no stock architecture does.
    """
    out = _free("export", options.out)
    source = checkpoint_folder(options.run)
    checkpoint = load_checkpoint(source)
    config = checkpoint.model.config
    if config.upper_kv != "own" and config.num_upper_layers:
        raise ValueError(
            f"export: upper_kv must be own, got {config.upper_kv}, which transformers has no layer "
            "for; train with --model.upper-kv own"
        )
    with safe_open(source / _WEIGHTS, "pt") as weights:
        dtype = weights.get_tensor("embedding.weight").dtype
    # of an imported model in 16 bits: its values are those, so nothing is rounded
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.model.state_dict().items()}
    with replacing_folder(out) as folder:
        _write_model(folder, config, state, checkpoint.tokenizer)
        _write_exit(folder, config, state, checkpoint.calibration)
    found = {
        "out": str(options.out),
        "architecture": ARCHITECTURES[model_type(config)],
        "dtype": str(dtype).removeprefix("torch."),
        "exit_layer": config.exit_layer,
        "same_norms": not config.num_upper_layers
        or torch.equal(state["exit_norm.weight"], state["final_norm.weight"]),
    }
    _print_export(console, found, config)
    return found


def import_checkpoint(options: Import, console: Console) -> dict[str, Any]:
    """`lego import`: all of the checkpoint or nothing.

    Raises: ValueError, before anything is written, if `out` is not free, or if the folder is not
        whole or holds what our model cannot.
    """
    out = _free("import", options.out)
    values = _read_json(options.folder / _CONFIG)
    exit_values = _read_exit(options.folder)
    exit_layer = options.exit_layer
    exported = exit_values.get("exit_layer")
    if exit_layer is None:
        exit_layer = exported
    if exit_layer is None:
        raise ValueError("import: --exit-layer must be given, for the folder names none, got none")
    with _whole(options.folder / _CONFIG):
        config = from_hf_config(values, exit_layer)
    tokenizer = _read_tokenizer(options.folder, values, config.vocab_size)
    same_exit = exit_layer == exported
    model = _read_model(options.folder, config, same_exit)
    calibration = exit_values.get("calibration") if same_exit else None
    with _whole(options.folder / _EXIT):
        calibrated = None if calibration is None else Calibration(**calibration)
    save_checkpoint(out, Checkpoint(model, tokenizer, calibrated))
    found = {
        "out": str(options.out),
        "architecture": ARCHITECTURES[values["model_type"]],
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "exit_layer": exit_layer,
        "end_of_text": tokenizer.end_of_text,
        "trained_exit": same_exit,
    }
    _print_import(console, found, config)
    return found


def _free(command: str, out: Path) -> Path:
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{command}: the output folder must be new or empty, got {out}")
    return out


def _write_model(
    folder: Path, config: ModelConfig, state: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    dtype, end_of_text_id = state["embedding.weight"].dtype, tokenizer.end_of_text_id
    _write_json(folder / _CONFIG, to_hf_config(config, dtype, end_of_text_id))
    _write_json(folder / "generation_config.json", {"eos_token_id": end_of_text_id})
    # transformers refuses weights that do not name the framework
    (folder / _WEIGHTS).write_bytes(save(to_hf_tensors(config, state), {"format": "pt"}))
    tokenizer.save(folder / _TOKENIZER)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end_of_text,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        # our tokenizers never read an end of text from the text
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _write_exit(
    folder: Path, config: ModelConfig, state: dict[str, Tensor], calibration: Calibration | None
) -> None:
    (folder / _EXIT).parent.mkdir()
    calibrated = None if calibration is None else asdict(calibration)
    values = {"format": _FORMAT, "exit_layer": config.exit_layer, "calibration": calibrated}
    _write_json(folder / _EXIT, values)
    if config.num_upper_layers:
        tensors = {name: state[name] for name in EXIT_TENSORS}
        (folder / _EXIT_TENSORS).write_bytes(save(tensors))


def _read_exit(folder: Path) -> dict[str, Any]:
    """What an export holds beside the model; nothing in a folder from elsewhere."""
    if not (folder / _EXIT).is_file():
        return {}
    values = _read_json(folder / _EXIT)
    if values.get("format") != _FORMAT:
        got = values.get("format")
        raise ValueError(f"import: {folder / _EXIT} must be of format {_FORMAT}, got {got}")
    return values


def _read_model(folder: Path, config: ModelConfig, same_exit: bool) -> LegoModel:
    with torch.device("meta"):  # nothing is drawn that the folder replaces
        model = LegoModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = from_hf_tensors(config, _read_tensors(folder), shapes)
    if config.num_upper_layers:
        if same_exit:
            state |= _read_exit_tensors(folder, shapes, state["embedding.weight"].dtype)
        else:
            # what LayerSkip trains: both exits share the last norm
            state["exit_norm.weight"] = state["final_norm.weight"].clone()
            state["gate.weight"] = state["embedding.weight"].new_zeros(1, config.dim)
            state["gate.bias"] = state["embedding.weight"].new_zeros(1)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    model.rotary = Rotary(config)  # its tables are no part of the state
    return model.eval()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the one file, or of all shards that the index names."""
    if not (folder / _INDEX).is_file():
        return _load_file(folder / _WEIGHTS)
    with _whole(folder / _INDEX):
        shards = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
        outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise ValueError(f"import: {_INDEX} must name files of the folder, got {outside[0]}")
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors |= _load_file(folder / name)
    return tensors


def _read_exit_tensors(
    folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors = _load_file(folder / _EXIT_TENSORS)
    for name in EXIT_TENSORS:
        if name not in tensors or tensors[name].shape != shapes[name]:
            got = tuple(tensors[name].shape) if name in tensors else "none"
            raise ValueError(
                f"import: {folder / _EXIT_TENSORS} must hold {name} {tuple(shapes[name])}, "
                f"got {got}"
            )
        if torch.promote_types(tensors[name].dtype, dtype) != dtype:
            raise ValueError(
                f"import: {folder / _EXIT_TENSORS} must fit into {dtype}, the model's, "
                f"got {tensors[name].dtype}"
            )
    return {name: tensors[name].to(dtype) for name in EXIT_TENSORS}


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        others = sorted(file.name for file in path.parent.glob("*.bin"))
        raise ValueError(
            f"import: must hold {path} (pickled weights are not read), got {others or 'none'}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"import: {path} must be whole, got {error}") from error


def _read_tokenizer(folder: Path, values: dict[str, Any], vocab_size: int) -> Tokenizer:
    """tokenizer.json; texts end with the first of the model's end-of-sequence tokens.

    Ids of the model beyond those of the tokenizer become `<|unused_ID|>`.
    """
    path = folder / _TOKENIZER
    if not path.is_file():
        raise ValueError(f"import: {path} must exist, got none; save_pretrained() writes it")
    generation = folder / "generation_config.json"
    end: Any = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    end = values.get("eos_token_id") if end is None else end
    first = end[0] if isinstance(end, list) and end else end
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"import: {path} must be whole, got {error}") from error
    with _whole(folder / _CONFIG):
        end_of_text = END_OF_TEXT if first is None else backend.id_to_token(first)
    if end_of_text is None:
        raise ValueError(f"import: {path} must hold the eos_token_id of the model, got no {first}")
    # embeddings are often padded; text never becomes a special token here, so these change nothing
    num_tokens = backend.get_vocab_size(with_added_tokens=True)
    backend.add_special_tokens([f"<|unused_{i}|>" for i in range(num_tokens, vocab_size)])
    tokenizer = Tokenizer(backend, end_of_text)
    if tokenizer.vocab_size != vocab_size:
        got = tokenizer.vocab_size
        raise ValueError(f"import: {path} must have vocab_size={vocab_size} tokens, got {got}")
    return tokenizer


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what a file of another shape runs into, a missing key say, into a mistake in it."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"import: {path} must be whole, got {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        hint = "" if path.parent.is_dir() else "; the folder has to be here already"
        raise ValueError(f"import: {path} must exist, got none{hint}")
    return read_json_object(path, "import")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(to_json(values), encoding="utf-8")


def _print_export(console: Console, found: dict[str, Any], config: ModelConfig) -> None:
    lines = [f"{found['out']}: {found['architecture']} in {found['dtype']}, with its tokenizer"]
    if config.num_upper_layers:
        lines.append(f"exit layer {found['exit_layer']}, exit norm and gate are in its folder lego")
    if not found["same_norms"]:
        lines.append(
            "the exit norm is not the final norm: early exit in transformers "
            "(assistant_early_exit) takes the final norm, so it drafts other tokens than our exit"
        )
    _print(console, lines)


def _print_import(console: Console, found: dict[str, Any], config: ModelConfig) -> None:
    lines = [
        f"{found['out']}: {found['architecture']} in {found['dtype']}, exit after layer "
        f"{found['exit_layer']} of {config.num_layers}, texts end with {found['end_of_text']}"
    ]
    if config.num_upper_layers and not found["trained_exit"]:
        lines.append(
            "the exit takes the final norm; the gate is zero and no threshold is calibrated"
        )
    _print(console, lines)


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
