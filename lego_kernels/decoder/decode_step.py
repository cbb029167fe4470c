"""A step of a decoder on the CPU in one call, and the prompt before it.

Native: csrc/cpu/decode_step.cpp. There is no plain torch form and no fake: `state` is a table of
addresses, as lego_kernels.decoder.state makes it, and what these ops write to lies behind it. They
trust it and the rows; the decoders check what people give them.
"""

import torch

from lego_kernels.library import LIB

LIB.define("decode_prefill(Tensor(a!) state, int row, Tensor ids) -> ()")
LIB.define("decode_step(Tensor(a!) state, Tensor rows, bool lower, bool upper) -> int")
LIB.define("decode_shallow(Tensor(a!) state, int row) -> int")
LIB.define("decode_speculate(Tensor(a!) state, Tensor rows) -> int")

# takes the prompt ids, int64 [T], T >= 1, of one row, which starts anew
decode_prefill = torch.ops.lego_kernels.decode_prefill.default
# takes rows, int64 [N], through the lower block, and those that stay through the upper one, or does
# only one of both; returns the number of new tokens in new_tokens, -1 if a logit was NaN
decode_step = torch.ops.lego_kernels.decode_step.default
# the token that an exit would have given in place of a row's newest one, -1 if a logit was NaN
decode_shallow = torch.ops.lego_kernels.decode_shallow.default
# drafts and verifies once in each row; returns as decode_step does
decode_speculate = torch.ops.lego_kernels.decode_speculate.default
