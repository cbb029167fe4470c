"""`lego export` and `lego import` without transformers: whole or not at all, back bit for bit."""

import errno
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from lego.calibration import Calibration
from lego.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lego.cli import run_command
from tests.runs import same_tensors, tiny_checkpoint

CALIBRATION = Calibration(shallow_ratio=0.5, num_tokens=99, threshold={"max_prob": 0.1 + 0.2})
SHAPES = {
    "plain": {"num_kv_heads": 2},
    "gqa": {},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True},
    "all": {"qk_norm": True, "qkv_bias": True, "tie_embeddings": False, "num_layers": 5},
    "dense": {"exit_layer": 4},
    "linear": {"rope_type": "linear", "rope_factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_seq_len": 16},
}
FILES = {"config.json", "generation_config.json", "lego", "model.safetensors"}
FILES |= {"tokenizer.json", "tokenizer_config.json"}


def random_checkpoint(**changes):
    """Every number of the model differs from what it starts with."""
    checkpoint = tiny_checkpoint(CALIBRATION, **({"upper_kv": "own"} | changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in checkpoint.model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return checkpoint


def exported(tmp_path, **changes):
    """A run folder, and its export."""
    save_checkpoint(tmp_path / "run" / "checkpoint", random_checkpoint(**changes))
    assert run_command(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    return tmp_path / "hf"


def bytes_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(folder, change, file="model"):
    tensors = load_file(folder / f"{file}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})


def refused(capsys, args, message):
    """The command ends with 2, its message in one line, and nothing at `out`."""
    assert run_command([*map(str, args)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert [path.name for path in args[2].parent.glob("*back*")] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_again(tmp_path, shape):
    hf = exported(tmp_path, **SHAPES[shape])
    assert {path.name for path in hf.iterdir()} == FILES
    assert run_command(["import", str(hf), str(tmp_path / "back")]) == 0
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "run" / "checkpoint")
    assert run_command(["export", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    assert bytes_of(tmp_path / "again") == bytes_of(hf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_stay(tmp_path, dtype):
    hf = exported(tmp_path)
    for file in ("model", "lego/exit"):
        change_tensors(hf, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}), file)
    assert run_command(["import", str(hf), str(tmp_path / "back")]) == 0
    assert run_command(["export", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    for file in ("model.safetensors", "lego/exit.safetensors"):
        assert same_bits(load_file(tmp_path / "again" / file), load_file(hf / file))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def same_bits(one, two):
    to_ints = [{name: t.view(torch.int16) for name, t in tensors.items()} for tensors in (one, two)]
    return all(t.dtype == two[n].dtype for n, t in one.items()) and same_tensors(*to_ints)


def test_unequal_dtypes_become_float32(tmp_path):
    hf = exported(tmp_path)
    change_tensors(hf, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    assert run_command(["import", str(hf), str(tmp_path / "back")]) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_shards(tmp_path):
    hf = exported(tmp_path, tie_embeddings=False)
    assert run_command(["import", str(hf), str(tmp_path / "one")]) == 0
    split(hf)
    assert run_command(["import", str(hf), str(tmp_path / "two")]) == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def split(hf, where="model-{}.safetensors"):
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    shards = {name: where.format(i % 3) for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, hf / Path(shard).name)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_index_may_not_leave_the_folder(tmp_path, capsys):
    hf = exported(tmp_path)
    split(hf, "../hf/model-{}.safetensors")
    refused(capsys, ["import", hf, tmp_path / "back"], "must name files of the folder, got ../hf")


def test_another_exit_layer(tmp_path, capsys):
    """The exit that was trained is for its own layer; another one has the last norm, no gate."""
    hf = exported(tmp_path)
    ours = load_checkpoint(tmp_path / "run" / "checkpoint").model
    capsys.readouterr()
    args = ["import", str(hf), str(tmp_path / "back"), "--exit-layer", "3", "--json"]
    assert run_command(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exit_layer"] == 3 and not found["trained_exit"]
    back = load_checkpoint(tmp_path / "back")
    assert back.model.config == replace(ours.config, exit_layer=3) and back.calibration is None
    assert torch.equal(back.model.exit_norm.weight, ours.final_norm.weight)
    assert not back.model.gate.weight.any() and not back.model.gate.bias.any()
    ids = torch.arange(20)[None]
    assert torch.equal(
        back.model.final_logits(back.model(ids).final_state),
        ours.final_logits(ours(ids).final_state),
    )


def test_folder_from_elsewhere(tmp_path, capsys):
    """No folder `lego`, old names in the config, another end of text, zero biases, tables."""
    hf = exported(tmp_path)
    for path in (hf / "lego").iterdir():
        path.unlink()
    backend = Backend.from_file(str(hf / "tokenizer.json"))
    text = backend.to_str().replace("<|endoftext|>", "</s>")
    (hf / "tokenizer.json").write_text(text)

    def older(config):
        del config["rope_parameters"], config["head_dim"]
        config.update(rope_theta=10000.0, rope_scaling=None, eos_token_id=[0, 7])

    change_json(hf / "config.json", older)
    (hf / "generation_config.json").unlink()
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(hf, lambda tensors: tensors.update(inverse))
    capsys.readouterr()
    refused(capsys, ["import", hf, tmp_path / "back"], "--exit-layer must be given")
    assert run_command(["import", str(hf), str(tmp_path / "back"), "--exit-layer", "2"]) == 0
    shown = capsys.readouterr().out
    assert "texts end with </s>" in shown and "the gate is zero" in shown
    back, ours = load_checkpoint(tmp_path / "back"), load_checkpoint(tmp_path / "run/checkpoint")
    assert back.tokenizer.end_of_text == "</s>" and back.tokenizer.end_of_text_id == 0
    assert back.model.config == ours.model.config
    assert torch.equal(
        back.model.upper[1].mlp.down_proj.weight, ours.model.upper[1].mlp.down_proj.weight
    )
    # saved anew, it still ends texts with its own token
    save_checkpoint(tmp_path / "anew", back)
    assert bytes_of(tmp_path / "anew") == bytes_of(tmp_path / "back")


def test_generates_from_an_imported_checkpoint(tmp_path, capsys):
    hf = exported(tmp_path)
    assert run_command(["import", str(hf), str(tmp_path / "back"), "--exit-layer", "1"]) == 0
    args = ["generate", str(tmp_path / "back"), "--prompt", "ann", "--max-new-tokens", "5"]
    capsys.readouterr()
    assert run_command([*args, "--mode", "full", "--json"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert run_command([*args, "--threshold", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == full["tokens"]
    # the export's calibration was of another exit layer
    assert run_command(args) == 2
    assert "--threshold must be given, got none for max_prob" in capsys.readouterr().err


CONFIGS = {
    "model_type": ("gpt2", "model_type must be one of llama, mistral, qwen2, qwen3, got gpt2"),
    "hidden_act": ("gelu", "hidden_act must be silu, got gelu"),
    "mlp_bias": (True, "mlp_bias must be false, got True"),
    "head_dim": (32, "head_dim must be 8, hidden_size by num_attention_heads, got 32"),
    "sliding_window": (16, "sliding_window must be none or at least max_position_embeddings=48"),
    "layer_types": (["sliding_attention"] * 4, "layer_types must be full_attention"),
    "quantization_config": ({"bits": 4}, "quantization_config must be none"),
    "rms_norm_eps": (None, "config.json must be whole, got no rms_norm_eps"),
    "hidden_size": ("16", "hidden_size must be a whole number, got '16'"),
    "num_attention_heads": (4.0, "num_attention_heads must be a whole number, got 4.0"),
    "intermediate_size": (25, "mlp.gate_proj.weight must be (25, 16), got (24, 16)"),
    "num_hidden_layers": (5, "model.layers.4.input_layernorm.weight must be there, got none"),
    "tie_word_embeddings": (False, "lm_head.weight must be there, got none"),
    "attention_bias": (True, "model.layers.0.self_attn.q_proj.bias must be there, got none"),
    "vocab_size": (299, "tokenizer.json must have vocab_size=299 tokens, got 300"),
    "eos_token_id": (999, "must hold the eos_token_id of the model, got no 999"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_our_model_cannot_hold(tmp_path, capsys, name):
    hf = exported(tmp_path)
    (hf / "generation_config.json").unlink()
    capsys.readouterr()
    value, message = CONFIGS[name]
    change_json(hf / "config.json", lambda config: config.update({name: value}))
    refused(capsys, ["import", hf, tmp_path / "back"], message)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 8.0}, "must be one of default, linear, llama3, got yarn"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor must be a number, got None"),
        (
            {"type": "linear", "factor": 0.5},
            "ModelConfig.rope_factor: must be finite and >= 1, got",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be"),
        ({"full_attention": {"rope_type": "linear"}}, "must be those of every layer alike"),
    ],
)
def test_rope_that_our_model_cannot_hold(tmp_path, capsys, rope, message):
    hf = exported(tmp_path)
    capsys.readouterr()
    change_json(hf / "config.json", lambda config: config.update(rope_parameters=rope))
    refused(capsys, ["import", hf, tmp_path / "back"], message)


NORM, O_PROJ = "model.norm.weight", "model.layers.1.self_attn.o_proj"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), f"{NORM} must be there, got none"),
    "left over": (lambda t: t.update(adapter=torch.ones(2)), "architecture alone, got adapter"),
    "shape": (lambda t: t.update({NORM: t[NORM][1:].clone()}), f"{NORM} must be (16,), got (15,)"),
    "dtype": (lambda t: t.update({NORM: t[NORM].double()}), "got torch.float64"),
    "bias": (
        lambda t: t.update({f"{O_PROJ}.bias": torch.ones(16)}),
        f"{O_PROJ}.bias must be zero: our model has no bias there",
    ),
    "head": (
        lambda t: t.update({"lm_head.weight": torch.ones(300, 16)}),
        "lm_head.weight must be the embedding, to which the config ties it",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_our_model_cannot_hold(tmp_path, capsys, name):
    hf = exported(tmp_path, qkv_bias=True)
    capsys.readouterr()
    change, message = TENSORS[name]
    change_tensors(hf, change)
    refused(capsys, ["import", hf, tmp_path / "back"], message)


@pytest.mark.parametrize("damage", [b"", b"\xff{" * 99, b"[1]", b"{}"], ids=range(4))
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "lego/exit.json"]
)
def test_damaged(tmp_path, capsys, name, damage):
    hf = exported(tmp_path)
    capsys.readouterr()
    (hf / name).write_bytes(damage)
    refused(capsys, ["import", hf, tmp_path / "back"], Path(name).stem)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing(tmp_path, capsys, name):
    hf = exported(tmp_path)
    capsys.readouterr()
    (hf / name).unlink()
    (hf / "pytorch_model.bin").write_bytes(b"")
    refused(capsys, ["import", hf, tmp_path / "back"], name)


def test_padded_vocabulary(tmp_path):
    """More embeddings than tokens, as Qwen has; texts keep their ids."""
    hf = exported(tmp_path)
    ours = load_checkpoint(tmp_path / "run" / "checkpoint").tokenizer
    change_json(hf / "config.json", lambda config: config.update(vocab_size=303))
    name = "model.embed_tokens.weight"
    padding = torch.ones(3, 16)
    change_tensors(hf, lambda t: t.update({name: torch.cat([t[name], padding])}))
    assert run_command(["import", str(hf), str(tmp_path / "back")]) == 0
    back = load_checkpoint(tmp_path / "back").tokenizer
    assert back.vocab_size == 303 and back.decode([300, 302]) == "<|unused_300|><|unused_302|>"
    for text in ("ann sees the dog .", "<|unused_300|>", "a<|unused_301|>b"):
        assert back.encode(text) == ours.encode(text)


def test_exit_tensors_that_would_be_rounded(tmp_path, capsys):
    hf = exported(tmp_path)
    capsys.readouterr()
    change_tensors(hf, lambda t: t.update({n: x.half() for n, x in t.items()}))
    message = "exit.safetensors must fit into torch.float16, the model's, got torch.float32"
    refused(capsys, ["import", hf, tmp_path / "back"], message)


def test_exit_tensors_of_another_model(tmp_path, capsys):
    hf = exported(tmp_path)
    capsys.readouterr()
    save_file({"gate.bias": torch.zeros(1)}, hf / "lego" / "exit.safetensors")
    refused(capsys, ["import", hf, tmp_path / "back"], "must hold exit_norm.weight (16,), got none")


def test_exit_state_models_are_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "run", random_checkpoint(upper_kv="exit_state"))
    message = "upper_kv must be own, got exit_state, which transformers has no layer for"
    refused(capsys, ["export", tmp_path / "run", tmp_path / "back"], message)


@pytest.mark.parametrize("command", ["export", "import"])
@pytest.mark.parametrize("taken", ["file", "folder"])
def test_out_must_be_free(tmp_path, capsys, command, taken):
    source = exported(tmp_path) if command == "import" else tmp_path / "run"
    if command == "export":
        save_checkpoint(tmp_path / "run", random_checkpoint())
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
    (out / "mine" if taken == "folder" else out).write_text("kept")
    capsys.readouterr()
    refused(capsys, [command, source, out], f"must be new or empty, got {out}")
    assert (out / "mine" if taken == "folder" else out).read_text() == "kept"


def test_out_may_be_empty(tmp_path):
    (tmp_path / "hf").mkdir()
    assert {path.name for path in exported(tmp_path).iterdir()} == FILES


@pytest.mark.parametrize(("name", "nth"), [("write_text", n) for n in range(1, 6)] + [
    ("write_bytes", 1), ("write_bytes", 2)
])  # fmt: skip
def test_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch, name, nth):
    save_checkpoint(tmp_path / "run", random_checkpoint())
    real, calls = getattr(Path, name), []

    def full(self, *args, **kwargs):
        calls.append(self.name)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, name, full)
    assert run_command(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "No space left" in capsys.readouterr().err and len(calls) == nth
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_says_that_the_norms_differ(tmp_path, capsys):
    exported(tmp_path)
    assert "the exit norm is not the final norm" in capsys.readouterr().out
    checkpoint = random_checkpoint()
    checkpoint.model.final_norm.weight.data.copy_(checkpoint.model.exit_norm.weight)
    save_checkpoint(tmp_path / "same", checkpoint)
    assert run_command(["export", str(tmp_path / "same"), str(tmp_path / "two"), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "out": str(tmp_path / "two"),
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "exit_layer": 2,
        "same_norms": True,
    }
    assert "the exit norm" not in shown.err


def test_calibration_goes_along(tmp_path):
    hf = exported(tmp_path)
    values = json.loads((hf / "lego" / "exit.json").read_text())
    assert values == {"format": 1, "exit_layer": 2, "calibration": asdict(CALIBRATION)}
    save_checkpoint(
        tmp_path / "b", Checkpoint(random_checkpoint().model, tiny_checkpoint().tokenizer)
    )
    assert run_command(["export", str(tmp_path / "b"), str(tmp_path / "b_hf")]) == 0
    assert run_command(["import", str(tmp_path / "b_hf"), str(tmp_path / "b_back")]) == 0
    assert load_checkpoint(tmp_path / "b_back").calibration is None
