"""The native engine: a LegoModel's weights in a decoder of lego_kernels."""

from __future__ import annotations

from lego.layers import Block
from lego.model import LegoModel
from lego_kernels.decoder.weights import DecoderWeights, Gate, LayerWeights, UpperKV


def decoder_weights(model: LegoModel) -> DecoderWeights:
    """The weights of a model where they lie, nothing copied."""
    config = model.config
    upper_kv = gate = None
    if model.upper:
        gate = Gate(weight=model.gate.weight[0], bias=model.gate.bias)
        if config.upper_kv == "exit_state":
            proj = model.upper_kv_proj
            upper_kv = UpperKV(norm=model.kv_norm.weight, proj=proj.weight, bias=proj.bias)
    return DecoderWeights(
        embedding=model.embedding.weight,
        lower=tuple(map(_layer, model.lower)),
        upper=tuple(map(_layer, model.upper)),
        upper_kv=upper_kv,
        exit_norm=model.exit_norm.weight,
        final_norm=model.final_norm.weight if model.upper else None,
        head=model.head.weight,
        gate=gate,
        cos=model.rotary.cos,
        sin=model.rotary.sin,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eps=config.norm_eps,
        vocab_size=config.vocab_size,
    )


def _layer(block: Block) -> LayerWeights:
    attention, mlp = block.attention, block.mlp
    return LayerWeights(
        attention_norm=block.attention_norm.weight,
        in_proj=attention.in_proj.weight,
        in_bias=attention.in_proj.bias,
        q_norm=attention.q_norm.weight if attention.qk_norm else None,
        k_norm=attention.k_norm.weight if attention.qk_norm else None,
        o_proj=attention.o_proj.weight,
        mlp_norm=block.mlp_norm.weight,
        gate_up=mlp.gate_up_proj.weight,
        down=mlp.down_proj.weight,
    )
