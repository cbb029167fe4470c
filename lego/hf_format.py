"""Our models under the names of transformers: configuration and tensors of the Llama family.

Both directions of `lego export` and `lego import`; transformers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lego.config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# what only our models have, by our names
EXIT_TENSORS = ("exit_norm.weight", "gate.weight", "gate.bias")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
_ORIGINAL_LEN = "original_max_position_embeddings"
# what scales the rotary frequencies, by their names
_ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_seq_len": _ORIGINAL_LEN,
    },
}


def model_type(config: ModelConfig) -> str:
    """The architecture that an export takes.

    Not qwen2 for the biases: transformers 5.23 gives that one its own pre-tokenizer, whatever
    tokenizer.json says.
    """
    return "qwen3" if config.qk_norm else "llama"


def to_hf_config(config: ModelConfig, dtype: torch.dtype, end_of_text_id: int) -> dict[str, Any]:
    """config.json of the model at full depth."""
    kind = model_type(config)
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    scaling = _scaling(config)
    values |= {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        # where transformers before 5, and others, look for it
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": end_of_text_id,
        "pad_token_id": None,
    }
    if config.rope_type != "default":
        values["rope_scaling"] = scaling
    return values


def _scaling(config: ModelConfig) -> dict[str, Any]:
    numbers = {theirs: getattr(config, ours) for ours, theirs in _ROPE[config.rope_type].items()}
    return {"rope_type": config.rope_type} | numbers


def from_hf_config(values: Mapping[str, Any], exit_layer: int) -> ModelConfig:
    """The model of a config.json, of transformers 5 or older, with an exit after `exit_layer`.

    Raises: ValueError, naming the entry, for what our model cannot hold.
    """
    kind = values.get("model_type")
    known = kind is None or kind in ARCHITECTURES
    _require(known, "model_type", f"one of {', '.join(ARCHITECTURES)}", kind)
    names = ("model_type", *_SIZES.values(), "rms_norm_eps")
    missing = [name for name in names if values.get(name) is None]
    _require(not missing, "config.json", "whole", f"no {', '.join(missing)}")
    sizes = {name: values[name] for name in _SIZES.values()} | {"exit_layer": exit_layer}
    for name, value in sizes.items():
        _require(type(value) is int, name, "a whole number", repr(value))
    eps = values["rms_norm_eps"]
    _require(isinstance(eps, float), "rms_norm_eps", "a number", repr(eps))
    _require_plain(values)
    heads = values["num_attention_heads"]
    num_kv_heads = values.get("num_key_value_heads") or (heads if kind == "llama" else 0)
    _require(num_kv_heads > 0, "num_key_value_heads", "there", "none")
    config = ModelConfig(
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        exit_layer=exit_layer,
        num_kv_heads=num_kv_heads,
        upper_kv="own",
        **_rope(values),
        norm_eps=eps,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(values.get("attention_bias"))),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )
    head_dim = values.get("head_dim") or (128 if kind == "qwen3" else config.head_dim)
    rule = f"{config.head_dim}, hidden_size by num_attention_heads"
    _require(head_dim == config.head_dim, "head_dim", rule, head_dim)
    return config


def _require_plain(values: Mapping[str, Any]) -> None:
    """Refuse what changes the function that the tensors compute."""
    _require(
        values.get("quantization_config") is None,
        *("quantization_config", "none", values.get("quantization_config")),
    )
    activation = values.get("hidden_act", "silu")
    _require(activation == "silu", "hidden_act", "silu", activation)
    _require(not values.get("mlp_bias"), "mlp_bias", "false", values.get("mlp_bias"))
    # 4096 is what transformers gives a Mistral whose file names none
    window = values.get("sliding_window", 4096 if values["model_type"] == "mistral" else None)
    if values["model_type"].startswith("qwen") and not values.get("use_sliding_window"):
        window = None
    kinds = set(values.get("layer_types") or ["full_attention"])
    _require(kinds == {"full_attention"}, "layer_types", "full_attention", ", ".join(kinds))
    longest = values["max_position_embeddings"]
    rule = f"none or at least max_position_embeddings={longest}"
    _require(window is None or window >= longest, "sliding_window", rule, window)


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our rotary fields, from wherever a version of transformers puts their parameters."""
    # of a file with both, transformers 5 takes the older entry
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    _require(isinstance(rope, Mapping), "rope_scaling", "an object", repr(rope))
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = isinstance(kind, str) and kind in _ROPE
    _require(known, "rope_type", f"one of {', '.join(_ROPE)}", kind)
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    _require(not nested, "rope_parameters", "those of every layer alike", ", ".join(nested))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    _require(share == 1.0, "partial_rotary_factor", "1.0", share)
    if kind == "llama3" and (length := values.get(_ORIGINAL_LEN)) is not None:
        # transformers 5 takes this one, older ones that of the scaling
        rule = f"{length}, as beside rope_parameters"
        _require(rope.get(_ORIGINAL_LEN) == length, _ORIGINAL_LEN, rule, rope.get(_ORIGINAL_LEN))
    numbers = {ours: _number(rope, theirs) for ours, theirs in _ROPE[kind].items()}
    thetas = [place.get("rope_theta") for place in (rope, values)]
    # 10,000 of all four architectures, where a file names none
    theta = next((value for value in thetas if value is not None), 10000.0)
    return numbers | {"rope_type": kind, "rope_theta": _number({"rope_theta": theta}, "rope_theta")}


def _number(rope: Mapping[str, Any], name: str) -> int | float:
    value: Any = rope.get(name)
    if name == _ORIGINAL_LEN:
        _require(type(value) is int, name, "a whole number", repr(value))
        return int(value)
    _require(type(value) in (int, float), name, "a number", repr(value))
    return float(value)


def tensor_names(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Their names by ours, in the order in which we pack them, with the rows of each."""
    names = {
        "embedding.weight": {"model.embed_tokens.weight": config.vocab_size},
        _last_norm(config): {"model.norm.weight": config.dim},
    }
    if not config.tie_embeddings:
        names["head.weight"] = {"lm_head.weight": config.vocab_size}
    for layer in range(config.num_layers):
        shallow = layer < config.exit_layer
        ours = f"lower.{layer}." if shallow else f"upper.{layer - config.exit_layer}."
        for name, parts in _layer_names(config).items():
            names[ours + name] = {f"model.layers.{layer}.{p}": rows for p, rows in parts.items()}
    return names


def _last_norm(config: ModelConfig) -> str:
    return "final_norm.weight" if config.num_upper_layers else "exit_norm.weight"


def _layer_names(config: ModelConfig) -> dict[str, dict[str, int]]:
    dim, hidden = config.dim, config.hidden_dim
    kv_rows = config.num_kv_heads * config.head_dim
    qkv = {"q_proj": dim, "k_proj": kv_rows, "v_proj": kv_rows}
    names = {
        "attention_norm.weight": {"input_layernorm.weight": dim},
        "mlp_norm.weight": {"post_attention_layernorm.weight": dim},
        "attention.o_proj.weight": {"self_attn.o_proj.weight": dim},
        "mlp.gate_up_proj.weight": {"mlp.gate_proj.weight": hidden, "mlp.up_proj.weight": hidden},
        "mlp.down_proj.weight": {"mlp.down_proj.weight": dim},
    }
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        names[f"attention.in_proj.{kind}"] = {
            f"self_attn.{p}.{kind}": rows for p, rows in qkv.items()
        }
    if config.qk_norm:
        for norm in ("q_norm.weight", "k_norm.weight"):
            names[f"attention.{norm}"] = {f"self_attn.{norm}": config.head_dim}
    return names


def to_hf_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model at full depth, each tensor with memory of its own."""
    tensors = {}
    for ours, parts in tensor_names(config).items():
        for name, tensor in zip(parts, state[ours].split(list(parts.values())), strict=True):
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    if config.qkv_bias:
        # theirs comes with one more bias, which ours lacks
        for layer in range(config.num_layers):
            tensors[_o_bias(layer)] = state["embedding.weight"].new_zeros(config.dim)
    return tensors


def from_hf_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Our tensors by our names, in one dtype that holds them all; not what only an exit has.

    shapes: Of our tensors, by our names.
    Raises: ValueError, naming the tensor, if one is missing, left over, or of a wrong shape or
        dtype, or if it is what our model lacks.
    """
    left = dict(tensors)
    state = {}
    for ours, parts in tensor_names(config).items():
        for name, rows in parts.items():
            shape = (rows, *shapes[ours][1:])
            _require(name in left, name, "there", "none")
            _require(left[name].shape == shape, name, str(shape), tuple(left[name].shape))
            _require(left[name].dtype in _DTYPES, name, _dtype_names(), left[name].dtype)
        state[ours] = torch.cat([left.pop(name) for name in parts])
    _drop_redundant(config, left, state["embedding.weight"])
    _require(not left, "tensors", "of the architecture alone", ", ".join(sorted(left)[:3]))
    dtype = torch.float32
    if len(found := {tensor.dtype for tensor in state.values()}) == 1:
        dtype = found.pop()
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def _drop_redundant(config: ModelConfig, left: dict[str, Tensor], embedding: Tensor) -> None:
    """Remove from `left` what adds nothing to the function: a tied head, zero biases, tables."""
    for name in [name for name in left if name.endswith("rotary_emb.inv_freq")]:
        del left[name]
    if config.tie_embeddings and "lm_head.weight" in left:
        same = torch.equal(left.pop("lm_head.weight"), embedding)
        _require(same, "lm_head.weight", "the embedding, to which the config ties it", "another")
    for name in [_o_bias(layer) for layer in range(config.num_layers) if config.qkv_bias]:
        if name in left:
            zero = not left.pop(name).any()
            _require(zero, name, "zero: our model has no bias there", "others")


def _o_bias(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.o_proj.bias"


def _dtype_names() -> str:
    return "float32, bfloat16 or float16"


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"import: {name} must be {rule}, got {got}")
