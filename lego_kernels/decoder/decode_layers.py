"""Transformer layers on a chunk of tokens in one call: what decode_step is made of, on its own.

Native: csrc/cpu/decode_layers.cpp. There is no plain torch form, since the weights come as a table
of addresses, which lego_kernels.decoder.state makes. Shape letters:
L layers, N tokens of the chunk, D width, B rows, S slots, K key/value heads, E head width.
"""

import torch

from lego_kernels.library import LIB

# what a row of the table points to, in the order of LayerWeights in C++; 0 where there is none
FIELDS = (
    "attention_norm",  # [D]
    "in_proj",  # queries, then keys, then values, as far as the layer makes them: [heads * E, D]
    "in_bias",  # [heads * E]
    "q_norm",  # [E]
    "k_norm",  # [E]
    "o_proj",  # [D, query heads * E]
    "mlp_norm",  # [D]
    "gate_up",  # [2 * hidden, D]
    "down",  # [D, hidden]
)

LIB.define(
    "decode_layers(Tensor layers, Tensor tokens, Tensor source, Tensor(a!) h, Tensor(b!)? states, "
    "Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor cos, Tensor sin, int num_heads, bool own_kv, "
    "int hidden_dim, float eps, Tensor(e!) workspace) -> ()"
)
torch.library.register_fake("lego_kernels::decode_layers", lambda *arguments: None, lib=LIB)
decode_layers = torch.ops.lego_kernels.decode_layers.default
