"""Checkpoint folders: exact round trips, and everything that can be wrong with one."""

import errno
import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lego.calibration import Calibration
from lego.checkpoint import load_checkpoint, save_checkpoint
from lego.tokenizer import train_tokenizer
from tests.runs import in_process, same_tensors, sentences, tiny_checkpoint

CALIBRATION = Calibration(
    shallow_ratio=0.5,
    num_tokens=7,
    threshold={"max_prob": 0.1 + 0.2, "margin": math.inf, "entropy": 1e-45, "gate": 0.0},
)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "calibration.json"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
@pytest.mark.parametrize("calibration", [CALIBRATION, None], ids=["calibrated", "plain"])
def test_round_trip(tmp_path, tied, upper_kv, calibration):
    ours = tiny_checkpoint(
        calibration, tie_embeddings=tied, upper_kv=upper_kv, qk_norm=True, qkv_bias=tied
    )
    ours.model.train()
    save_checkpoint(tmp_path / "a" / "b", ours)
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == FILES - (set() if calibration else {"calibration.json"})
    state = torch.get_rng_state()
    found = load_checkpoint(tmp_path / "a" / "b")
    torch.set_rng_state(state)
    assert found.model.config == ours.model.config
    assert same_tensors(found.model.state_dict(), ours.model.state_dict())
    assert (found.model.head.weight is found.model.embedding.weight) == tied
    assert not found.model.training
    assert found.calibration == calibration
    assert found.tokenizer.backend.to_str() == ours.tokenizer.backend.to_str()


def test_rope_scaling(tmp_path):
    """Its fields come back; a file from before they were there has none of it."""
    scaling = {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_seq_len": 16}
    ours = tiny_checkpoint(**scaling)
    save_checkpoint(tmp_path / "a", ours)
    found = load_checkpoint(tmp_path / "a").model
    assert found.config == ours.model.config
    assert torch.equal(found.rotary.cos, ours.model.rotary.cos)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    fields = {k: v for k, v in config["model"].items() if k == "rope_theta" or "rope" not in k}
    path.write_text(json.dumps(config | {"model": fields}))
    plain = tiny_checkpoint().model
    older = load_checkpoint(tmp_path / "a").model
    assert older.config == plain.config and torch.equal(older.rotary.cos, plain.rotary.cos)
    assert not torch.equal(older.rotary.cos, ours.model.rotary.cos)


def test_dense(tmp_path):
    ours = tiny_checkpoint()
    dense = replace(ours, model=type(ours.model)(ours.model.config.dense(3)))
    save_checkpoint(tmp_path / "a", dense)
    found = load_checkpoint(tmp_path / "a").model
    assert (len(found.lower), len(found.upper)) == (3, 0)
    assert same_tensors(found.state_dict(), dense.model.state_dict())


def test_replaces_an_older_one(tmp_path):
    save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION))
    save_checkpoint(tmp_path / "a", tiny_checkpoint(upper_kv="own"))
    assert load_checkpoint(tmp_path / "a").calibration is None  # nothing of the old one is left
    assert load_checkpoint(tmp_path / "a").model.config.upper_kv == "own"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def refused(path, name):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(path / name) in str(error.value), error.value
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["half", "empty", "noise", "removed"])
def test_damaged(tmp_path, name, damage):
    save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION))
    path = tmp_path / "a" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "removed" and name == "calibration.json":
        assert load_checkpoint(tmp_path / "a").calibration is None
        return
    if damage != "removed":
        new = {"half": content[: len(content) // 2], "empty": b"", "noise": b"\xff\x00{" * 99}
        path.write_bytes(new[damage])
    if damage == "removed" and name == "config.json":
        with pytest.raises(ValueError, match="must hold config.json, got .*a$"):
            load_checkpoint(tmp_path / "a")
    else:
        refused(tmp_path / "a", name)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="a checkpoint folder must hold config.json, got .*none"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "format 1, got 2"),
        (lambda c: c.pop("format"), "format 1, got None"),
        (lambda c: c.pop("model"), "must be whole, got 'model'"),
        (lambda c: c.update(model=3), "must be whole"),
        (lambda c: c["model"].update(colour=3), "must be whole, got .*colour"),
        (lambda c: c["model"].update(dim="16"), "must be whole"),
        (lambda c: c["model"].update(dim=0), "must be >= 1, got 0"),
        (lambda c: c["model"].update(upper_kv="none"), "got 'none'"),
    ],
)
def test_wrong_config(tmp_path, change, message):
    save_checkpoint(tmp_path / "a", tiny_checkpoint())
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a")
    refused(tmp_path / "a", "config.json")


def test_config_is_an_object(tmp_path):
    save_checkpoint(tmp_path / "a", tiny_checkpoint())
    (tmp_path / "a" / "config.json").write_text("[1]")
    assert "must hold a JSON object, got [1]" in refused(tmp_path / "a", "config.json")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "untied"])
def test_weights_of_another_model(tmp_path, change):
    save_checkpoint(tmp_path / "a", tiny_checkpoint(tie_embeddings=change != "untied"))
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["exit_norm.weight"]
    elif change == "extra":
        tensors["lower.9.weight"] = torch.zeros(2)
    elif change == "shape":
        tensors["embedding.weight"] = tensors["embedding.weight"][:-1].clone()
    else:
        del tensors["head.weight"]
    save_file(tensors, path)
    refused(tmp_path / "a", "model.safetensors")


def test_untied_weights_do_not_pass_for_tied_ones(tmp_path):
    save_checkpoint(tmp_path / "a", tiny_checkpoint(tie_embeddings=False))
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace('"tie_embeddings": false', '"tie_embeddings": true'))
    refused(tmp_path / "a", "model.safetensors")


def test_tokenizer_of_another_model(tmp_path):
    ours = tiny_checkpoint()
    save_checkpoint(tmp_path / "a", ours)
    train_tokenizer("bpe", sentences(20), 299).save(tmp_path / "a" / "tokenizer.json")
    message = refused(tmp_path / "a", "tokenizer.json")
    assert "must have 300 tokens, got 299" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("threshold"),
        lambda c: c.update(colour=3),
        lambda c: c.update(threshold=0.5),
        lambda c: c.update(threshold={"max_prob": "high"}),
    ],
    ids=["missing", "unknown", "not by criterion", "not a number"],
)
def test_wrong_calibration(tmp_path, change):
    save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION))
    path = tmp_path / "a" / "calibration.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    refused(tmp_path / "a", "calibration.json")


def save_with_small_disk(path, limit):
    """Exit code 0 if a disk that holds `limit` bytes of a file is an OSError."""
    checkpoint = tiny_checkpoint(upper_kv="own")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(path, checkpoint)
    except OSError as error:
        raise SystemExit(0 if error.errno == errno.EFBIG else 1) from error
    raise SystemExit(2)


# config.json fails, or the weights
@pytest.mark.parametrize("limit", [10, 1000])
@pytest.mark.parametrize("before", [True, False])
def test_disk_full(tmp_path, limit, before):
    if before:
        save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION))
    assert in_process(save_with_small_disk, tmp_path / "a", limit) == 0
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if before else [])
    if before:
        found = load_checkpoint(tmp_path / "a")
        assert found.calibration == CALIBRATION
        assert same_tensors(found.model.state_dict(), tiny_checkpoint().model.state_dict())


@pytest.mark.parametrize(
    ("name", "nth"), [("write_text", 1), ("write_bytes", 1), ("write_text", 2), ("write_text", 3)]
)
def test_disk_full_at_any_file(tmp_path, monkeypatch, name, nth):
    """config.json, model.safetensors, tokenizer.json, calibration.json."""
    save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION))
    real, calls = getattr(Path, name), []

    def full(self, *args, **kwargs):
        calls.append(self.name)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, name, full)
        save_checkpoint(tmp_path / "a", tiny_checkpoint(CALIBRATION, upper_kv="own"))
    assert len(calls) == nth
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert load_checkpoint(tmp_path / "a").model.config.upper_kv == "exit_state"
