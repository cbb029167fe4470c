"""What `lego export` writes loads in transformers, unhelped, and computes the same; and back."""

import copy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lego.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lego.config import ModelConfig
from lego.engine import NativeEngine
from lego.generation import generate
from lego.hf_checkpoint import Export, Import, export_checkpoint, import_checkpoint
from lego.model import LegoModel
from lego.ops.rotary import rotary_tables
from lego.strategies import FullDepth
from lego.tokenizer import train_tokenizer
from tests.models import VARIANTS, tiny_model, token_ids
from tests.runs import own_run

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="needs transformers >= 5: pip install '.[hf]'"
)

QUIET = Console(quiet=True)
TEXT = (
    9 * "ann sees the red ball .\n\nI'M here, don't 2024  e\u0301 \u00e9 \u4e2d\u6587 \U0001f600\n"
)
TEXTS = [
    TEXT,
    "2024-11-22 12345",
    " lead  and trail\t",
    "x<|endoftext|>y <unk> z",
    "e\u0301 \u00e9",
]


def export(tmp_path: Path, model: LegoModel, kind="bpe") -> Checkpoint:
    """tmp_path/hf, of the model with as many tokens as a tokenizer of TEXT has."""
    tokenizer = train_tokenizer(kind, TEXT, 300)
    checkpoint = Checkpoint(model, tokenizer)
    save_checkpoint(tmp_path / "ours", checkpoint)
    export_checkpoint(Export(run=tmp_path / "ours", out=tmp_path / "hf"), QUIET)
    return checkpoint


def model_of(kind="bpe", **changes) -> LegoModel:
    vocab_size = train_tokenizer(kind, TEXT, 300).vocab_size
    return tiny_model("own", dtype=torch.float32, vocab_size=vocab_size, **changes).eval()


def final_logits(model: LegoModel, ids):
    return model.final_logits(model(ids).final_state)


def exit_logits(model: LegoModel, ids):
    return model.exit_logits(model(ids).exit_state)


def assert_logits(found, model: LegoModel, ids, logits=final_logits):
    """Error at most twice our own in float32, plus 2e-5: they compute the angles in float32."""
    exact = logits(copy.deepcopy(model).double(), ids)
    own_error = (logits(model, ids) - exact).abs().max()
    assert own_error < 2e-4
    assert (found - exact).abs().max() <= 2 * own_error + 2e-5


EXPORTED = {
    **VARIANTS,
    "dense": {"exit_layer": 4},
    "linear": {"rope_type": "linear", "rope_factor": 4.0},
    # 16 of 64 positions; of four frequencies the highest is kept, the next one scaled in part
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 30.0,
        "rope_factor": 4.0,
        "rope_low_freq_factor": 0.5,
        "rope_high_freq_factor": 2.0,
        "rope_original_seq_len": 16,
    },
}


@pytest.mark.parametrize("variant", EXPORTED)
@torch.no_grad()
def test_the_same_logits_and_tokens(tmp_path, variant):
    model = model_of(**EXPORTED[variant])
    export(tmp_path, model)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()) and theirs.dtype == torch.float32
    ids = token_ids(3, 60, seed=2)
    assert_logits(theirs(ids).logits, model, ids)
    prompt = ids[0, :9].tolist()
    ours = generate(model, [prompt], 12, FullDepth(), stop_tokens=[0]).tokens[0]
    found = theirs.generate(ids[:1, :9], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found[0, 9:].tolist() == ours


@pytest.mark.parametrize("kind", ["bpe", "word"])
@pytest.mark.parametrize("variant", ["plain", "qkv_bias", "qk_norm"])
def test_the_same_token_ids(tmp_path, variant, kind):
    """The architecture must not decide the tokenizer: some bring a pre-tokenizer of their own."""
    ours = export(tmp_path, model_of(kind, **VARIANTS[variant]), kind).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.end_of_text_id and len(theirs) == ours.vocab_size


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": None,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 30.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
STOCK = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama bias": ("LlamaConfig", {"attention_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
}


def stock_model(name: str, tokenizer):
    kind, changes = STOCK[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SMALL | changes | {"vocab_size": tokenizer.vocab_size})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn_like(parameter)
        # what our model lacks, a bias there, stays zero
        parameter.data.add_(0 if parameter_name.endswith("o_proj.bias") else noise)
    return model


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_imports_what_transformers_wrote(tmp_path, name):
    """In shards, to our logits, and back to transformers, bit for bit."""
    tokenizer = train_tokenizer("bpe", TEXT, 300)
    stock = stock_model(name, tokenizer)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="50KB")
    assert (tmp_path / "stock" / "model.safetensors.index.json").is_file()
    tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    options = Import(folder=tmp_path / "stock", out=tmp_path / "ours", exit_layer=1)
    import_checkpoint(options, QUIET)
    model, ids = load_checkpoint(tmp_path / "ours").model, token_ids(2, 50, seed=3)
    assert_logits(stock(ids).logits, model, ids)
    # early exit as LayerSkip has it: the last norm over the hidden state of the exit layer
    hidden = stock(ids, output_hidden_states=True).hidden_states[1]
    shallow = stock.lm_head(stock.model.norm(hidden))
    assert_logits(shallow, model, ids, exit_logits)
    export_checkpoint(Export(run=tmp_path / "ours", out=tmp_path / "back"), QUIET)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(back.pop(key), tensor), key
    assert all(key.endswith("o_proj.bias") and not value.any() for key, value in back.items())


@torch.no_grad()
def test_bfloat16_is_not_rounded_again(tmp_path):
    tokenizer = train_tokenizer("bpe", TEXT, 300)
    stock = stock_model("llama", tokenizer).bfloat16()
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    options = Import(folder=tmp_path / "stock", out=tmp_path / "ours", exit_layer=1)
    import_checkpoint(options, QUIET)
    export_checkpoint(Export(run=tmp_path / "ours", out=tmp_path / "back"), QUIET)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.bfloat16
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[key]), key


@pytest.mark.parametrize("name", ["llama3", "linear"])
@torch.no_grad()
def test_scaled_angles(tmp_path, name):
    """Greedy tokens, most past the original length, in both of our engines; and the way back."""
    tokenizer = train_tokenizer("bpe", TEXT, 300)
    stock = stock_model(name, tokenizer)
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    options = Import(folder=tmp_path / "stock", out=tmp_path / "ours", exit_layer=1)
    import_checkpoint(options, QUIET)
    model, ids = load_checkpoint(tmp_path / "ours").model, token_ids(1, 12, seed=4)
    reference = generate(model, ids.tolist(), 50, FullDepth()).tokens
    native = generate(model, ids.tolist(), 50, FullDepth(), engine=NativeEngine(model)).tokens
    theirs = stock.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=-1)
    assert native == reference == theirs[:, 12:].tolist()
    names = [field.name for field in fields(ModelConfig) if field.name.startswith("rope_")]
    unscaled = {name: getattr(ModelConfig, name) for name in names if name != "rope_theta"}
    plain = LegoModel(replace(model.config, **unscaled))
    plain.load_state_dict(model.state_dict())
    assert generate(plain, ids.tolist(), 50, FullDepth()).tokens != reference
    export_checkpoint(Export(run=tmp_path / "ours", out=tmp_path / "hf"), QUIET)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert back.config.rope_parameters == stock.config.rope_parameters
    assert torch.equal(back(ids).logits, stock(ids).logits)
    import_checkpoint(Import(folder=tmp_path / "hf", out=tmp_path / "again"), QUIET)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0], ids=["Llama 3.1", "Llama 3.2"])
@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_tables_of_real_models(kind, factor, head_dim):
    """Theirs, but for what float32 angles round."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": 5e5, "factor": factor}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    sizes = {"hidden_size": head_dim, "num_attention_heads": 1}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=131072, rope_parameters=rope)
    module, position = LlamaRotaryEmbedding(config), torch.arange(20_000)
    band = (1 / 8192, 4 / 8192) if kind == "llama3" else None
    ours = rotary_tables(head_dim, 20_000, 5e5, factor=factor, band=band)
    # 8 roundings of a frequency, times the position, and one of the result
    bound = position[:, None] * module.inv_freq * 8 * 2**-24 + 2**-23
    for found, theirs in zip(ours, module(torch.empty(1), position[None]), strict=True):
        assert bool(((found - theirs[0, :, : head_dim // 2]).abs() <= bound).all())


def test_other_scalings_are_refused(tmp_path):
    """As transformers itself writes them."""
    tokenizer = train_tokenizer("bpe", TEXT, 300)
    stock = stock_model("llama", tokenizer)
    stock.config.rope_parameters = LINEAR | {
        "rope_type": "yarn",
        "original_max_position_embeddings": 16,
    }
    stock.save_pretrained(tmp_path / "stock")
    tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    options = Import(folder=tmp_path / "stock", out=tmp_path / "ours", exit_layer=1)
    message = "rope_type must be one of default, linear, llama3, got yarn"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(options, QUIET)
    assert not (tmp_path / "ours").exists()


def test_configs_of_transformers_name_what_is_read(tmp_path):
    """An import of our own export needs no default: every entry that it reads is in the file."""
    ours = export(tmp_path, model_of(qkv_bias=True)).model.config
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    config.save_pretrained(tmp_path / "hf")
    import_checkpoint(Import(folder=tmp_path / "hf", out=tmp_path / "back"), QUIET)
    found = load_checkpoint(tmp_path / "back").model.config
    assert isinstance(found, ModelConfig) and found == ours


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model of transformers, tokenizer, our checkpoint) of a tiny model that `lego train` made."""
    out = tmp_path_factory.mktemp("trained")
    export_checkpoint(Export(run=own_run(), out=out / "hf"), QUIET)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, load_checkpoint(own_run() / "checkpoint")


@pytest.mark.parametrize("options", [{}, {"mode": "speculative", "exit_layer": 2}], ids=str)
def test_a_trained_model_is_accelerated(trained, options):
    """Real text, ragged: transformers' tokens, which are ours."""
    from lego_kernels.hf import accelerate

    model, tokenizer, checkpoint = trained
    texts = ["ann sees", "the red ball is in the", "bob"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    wanted = model.generate(**batch, max_new_tokens=20, do_sample=False)
    fast = accelerate(model, **options)
    assert torch.equal(fast.generate(**batch, max_new_tokens=20, do_sample=False), wanted)
    fast.undo()
    prompt = checkpoint.tokenizer.encode(texts[0])
    end = checkpoint.tokenizer.end_of_text_id
    ours = generate(checkpoint.model, [prompt], 20, FullDepth(), stop_tokens=[end]).tokens[0]
    assert wanted[0, batch["input_ids"].size(1) :].tolist()[: len(ours)] == ours


def test_early_exit_of_a_trained_model(trained):
    """A threshold that every token reaches runs the lower block alone, on the final norm."""
    from lego_kernels.hf import accelerate

    model, tokenizer, _ = trained
    batch = tokenizer("ann sees", return_tensors="pt")
    fast = accelerate(model, mode="early_exit", exit_layer=2, threshold=0.0)
    found = fast.generate(**batch, max_new_tokens=8, return_dict_in_generate=True)
    fast.undo()
    assert found.exit_layers.unique().tolist() == [2]
    assert bool((found.confidences > 0).all())
