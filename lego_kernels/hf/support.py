"""Which transformers models the decoder stands in for, and what keeps it from others."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lego_kernels import library
from lego_kernels.validation import DTYPES

FAMILIES = {
    LlamaForCausalLM: "llama",
    MistralForCausalLM: "mistral",
    Qwen2ForCausalLM: "qwen2",
    Qwen3ForCausalLM: "qwen3",
}
# subclasses of ours, which change generate() alone
_OURS = "lego_kernels.hf.classes"
# whose frequencies do not depend on how long a sequence is
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_model(model: nn.Module) -> None:
    """Raise ValueError unless a decoder computes what the model computes.

    Raises: RuntimeError if the CPU kernels are not loaded, the model is in training mode or
        autocast is on, of which the decoder would know nothing.
    """
    family = _family(type(model))
    if family is None:
        names = ", ".join(kind.__name__ for kind in FAMILIES)
        raise ValueError(f"accelerate: model must be one of {names}, got {type(model).__name__}")
    if missing := library.NOT_LOADED["CPU"]:
        raise RuntimeError(f"accelerate: the CPU kernels must be loaded, got {missing}")
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError(
            "accelerate: autocast must be off, got it on; cast the model instead: "
            f"model.to({torch.get_autocast_dtype('cpu')})"
        )
    _check_config(model.config)
    _check_modules(model, family)
    _check_rotary(model)
    _check_parameters(model)


def _family(kind: type) -> str | None:
    kinds = kind.__mro__ if kind.__module__ == _OURS else (kind,)
    return next((FAMILIES[each] for each in kinds if each in FAMILIES), None)


def num_positions(config: PreTrainedConfig) -> int:
    """The longest sequence on which a decoder, which attends to all of it, does as the model."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return config.max_position_embeddings
    return min(config.max_position_embeddings, window)


def _check_config(config: PreTrainedConfig) -> None:
    wanted = {
        "quantization_config": None,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    for name, value in wanted.items():
        got = getattr(config, name, None)
        if got not in (None, value):
            raise ValueError(f"accelerate: config.{name} must be {value!r}, got {got!r}")
    kinds = set(getattr(config, "layer_types", None) or ())
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            "accelerate: layer_types must be full_attention or sliding_attention, "
            f"got {min(strange)}"
        )


def _check_modules(model: PreTrainedModel, family: str) -> None:
    """The modules of the family and nothing put between them."""
    homes = (
        f"transformers.models.{family}.modeling_{family}",
        "transformers.activations",
        "torch.nn.modules.activation",
        _OURS,
    )
    for name, module in model.named_modules():
        kind, name = type(module), name or "model"
        if module.training:
            raise RuntimeError(f"accelerate: model must be in eval mode, got {name} in train")
        if kind not in (nn.Linear, nn.Embedding, nn.ModuleList) and kind.__module__ not in homes:
            raise ValueError(
                f"accelerate: {name} must be the stock module of {family}, unquantised and "
                f"without an adapter, got {kind.__module__}.{kind.__name__}"
            )
        own = type(module).forward.__get__(module)
        if vars(module).get("forward", own) != own or _has_hooks(module):
            raise ValueError(
                f"accelerate: {name} must have the forward of its class and no hooks, "
                "which would not run, got one"
            )
        if isinstance(module, nn.Linear) and module.bias is not None:
            if not name.endswith(("q_proj", "k_proj", "v_proj")):
                raise ValueError(f"accelerate: {name} must have no bias, got one")


def _has_hooks(module: nn.Module) -> bool:
    """Those of transformers itself do not count: they record outputs, and stay once installed."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _check_rotary(model: PreTrainedModel) -> None:
    rope_type = model.model.rotary_emb.rope_type
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"accelerate: rope_type must be one of {ROPE_TYPES}, got {rope_type!r}")
    factor = model.config.rope_parameters.get("partial_rotary_factor", 1.0)
    if factor != 1:
        raise ValueError(f"accelerate: partial_rotary_factor must be 1, got {factor}")


def _check_parameters(model: PreTrainedModel) -> None:
    like = model.model.embed_tokens.weight
    if like.dtype not in DTYPES:
        raise ValueError(
            f"accelerate: model must be float32, bfloat16 or float16, got {like.dtype}"
        )
    seen: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "cpu":
            raise ValueError(f"accelerate: {name} must be on the CPU, got {parameter.device}")
        if parameter.dtype != like.dtype:
            raise ValueError(
                f"accelerate: {name} must be {like.dtype} as the embedding, got {parameter.dtype}"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"accelerate: {name} must be contiguous, got {parameter.stride()}")
        # one of two layers would have to be packed twice; a tied head is never packed
        if parameter in seen and name != "lm_head.weight":
            raise ValueError(
                f"accelerate: {name} must be of one layer alone, got that of {seen[parameter]}"
            )
        seen[parameter] = name
