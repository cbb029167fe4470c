"""The weights of a transformers model as the decoder reads them, held once.

transformers keeps q, k, v apart, and gate and up; the decoder reads them packed. They are packed
once, and the model's parameters become views of that. Shape letters: P positions, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lego_kernels.decoder.weights import DecoderWeights, LayerWeights
from lego_kernels.hf.support import num_positions

# a packed tensor and the parameters that are views of it
_Pack = tuple[Tensor, list[nn.Parameter]]


class Memory(NamedTuple):
    """Bytes of weights that model and decoder share, and bytes that the model did not have."""

    shared: int
    added: int


class SharedWeights:
    """A model's weights with the first num_lower layers as the lower block; release() undoes it.

    The model's parameters stay the same objects with the same values. What training or
    load_state_dict writes into them shows in `weights`.
    Raises: ValueError, with the model as it was, if DecoderWeights does not take them.
    """

    def __init__(self, model: PreTrainedModel, num_lower: int) -> None:
        self._model = model
        self._packed: list[_Pack] = []
        self._made: list[_Pack] = []  # those that were not there before
        with ExitStack() as undo:
            # packs of an earlier acceleration stay
            undo.callback(_separate, self._made)
            self.weights = self._weights(num_lower)
            undo.pop_all()
        self._places = self._where()
        unique = {p.data_ptr(): p.nbytes for p in model.parameters()}
        tables = self.weights.cos.nbytes + self.weights.sin.nbytes
        self.memory = Memory(shared=sum(unique.values()), added=tables)

    def release(self) -> None:
        """Give each packed parameter memory of its own again."""
        _separate(self._packed)
        self._packed = []

    @property
    def is_shared(self) -> bool:
        """Whether the model's parameters lie where the decoder reads them."""
        return bool(self._packed) and self._where() == self._places

    def _where(self) -> list[tuple[str, int]]:
        return [(name, p.data_ptr()) for name, p in self._model.named_parameters()]

    def _weights(self, num_lower: int) -> DecoderWeights:
        model = self._model
        config, norm = model.config, model.model.norm.weight
        layers = tuple(map(self._layer, model.model.layers))
        cos, sin = rotary_tables(model)
        return DecoderWeights(
            embedding=model.model.embed_tokens.weight,
            lower=layers[:num_lower],
            upper=layers[num_lower:],
            # an exit goes through the model's own norm and head
            exit_norm=norm,
            final_norm=norm if num_lower < len(layers) else None,
            head=model.lm_head.weight,
            cos=cos,
            sin=sin,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
            vocab_size=model.lm_head.weight.size(0),
        )

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return LayerWeights(
            attention_norm=layer.input_layernorm.weight,
            in_proj=self._pack([proj.weight for proj in qkv]),
            in_bias=None if qkv[0].bias is None else self._pack([proj.bias for proj in qkv]),
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            o_proj=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=self._pack([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
        )

    def _pack(self, parameters: list[nn.Parameter]) -> Tensor:
        """One tensor of these by rows, of which they are views afterwards."""
        packed = _as_packed(parameters)
        if packed is None:
            packed = torch.cat([p.detach() for p in parameters])
            for parameter, rows in zip(
                parameters, packed.split([len(p) for p in parameters]), strict=True
            ):
                parameter.data = rows
            self._made.append((packed, parameters))
        self._packed.append((packed, parameters))
        return packed


@torch.no_grad()
def rotary_tables(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [P, E / 2], of all positions, by the model's own rotary module."""
    like = torch.empty(1, dtype=torch.float32)
    positions = torch.arange(num_positions(model.config))[None]
    cos, sin = (table[0] for table in model.model.rotary_emb(like, positions))
    half = cos.size(1) // 2
    # the module repeats each half
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()


def _as_packed(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The tensor that an earlier acceleration made these views of, if there is one."""
    first, place = parameters[0].detach(), _storage(parameters[0])
    for parameter in parameters:
        if _storage(parameter) != _storage(first) or parameter.data_ptr() != place:
            return None
        place += parameter.nbytes
    storage = first.untyped_storage()
    # longer where the parameters lie in a file that is mapped as a whole
    if place != storage.data_ptr() + storage.nbytes():
        return None
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


def _separate(packs: Sequence[_Pack]) -> None:
    """Give each parameter that is still a view of its pack memory of its own."""
    for packed, parameters in packs:
        for parameter in parameters:
            if _storage(parameter) == _storage(packed):
                parameter.data = parameter.data.clone()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
