"""One small call of every op of lego_kernels against its reference in lego.ops, for the doctor."""

# Shape letters: B rows, S slots, Hkv key-value heads, E head width.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lego.ops.compact import compact
from lego.ops.decode_attention import decode_attention
from lego.ops.exit_decision import exit_decision
from lego.ops.exit_gate import exit_gate
from lego.ops.kv_append import kv_append
from lego.ops.linear_small import linear_small
from lego.ops.rms_norm import rms_norm
from lego.ops.rope_kv_append import rope_kv_append
from lego.ops.rotary import rotary_tables
from lego.ops.swiglu import swiglu

Op = Callable[..., Any]


def _close(got: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding: tokens and flags to the bit, float32 to 1e-4."""
    return torch.allclose(got.float(), expected.float(), rtol=1e-4, atol=1e-4)


def _all_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(_close(x, y) for x, y in zip(got, expected, strict=True))


def _rms_norm(op: Op, device: str) -> bool:
    x, residual, weight = torch.randn(3, 5, 40, device=device).unbind()
    summed = residual.clone()
    got = op(x, weight[0], eps=1e-5, residual=summed)
    return _close(got, rms_norm(x + residual, weight[0], eps=1e-5)) and _close(summed, x + residual)


def _swiglu(op: Op, device: str) -> bool:
    gate_up = torch.randn(3, 40, device=device)
    return _close(op(gate_up), swiglu(gate_up))


def _linear_small(op: Op, device: str) -> bool:
    x, w = torch.randn(3, 40, device=device), torch.randn(50, 40, device=device)
    return _close(op(x, w), linear_small(x, w))


def _exit_gate(op: Op, device: str) -> bool:
    h, weight, norm = torch.randn(3, 5, 40, device=device).unbind()
    bias = torch.zeros(1, device=device)
    got = op(h, weight[0], bias, threshold=0.5, norm_weight=norm[0])
    return _all_close(got, exit_gate(h, weight[0], bias, threshold=0.5, norm_weight_D=norm[0]))


def _exit_decision(op: Op, device: str) -> bool:
    h, head = torch.randn(3, 40, device=device), torch.randn(300, 40, device=device) / 4
    greedy = exit_decision(h, head, threshold=0.1)
    drawn = exit_decision(h, head, threshold=0.1, temperature=1.0, seed=1, offset=2)
    return _all_close(op(h, head, threshold=0.1), greedy) and _all_close(
        op(h, head, threshold=0.1, temperature=1.0, seed=1, offset=2), drawn
    )


def _caches(device: str) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = torch.zeros(2, 3, 8, 2, 8, device=device)  # [B, S, Hkv, E]
    return k_cache, v_cache


def _kv_append(op: Op, device: str) -> bool:
    k, v = torch.randn(2, 3, 2, 2, 8, device=device)  # [B, 2, Hkv, E]
    position = torch.tensor([1, -1, 5], device=device)
    got, expected = _caches(device), _caches(device)
    op(*got, k, v, position)
    kv_append(*expected, k, v, position)
    return _all_close(got, expected)


def _rope_kv_append(op: Op, device: str) -> bool:
    qkv = torch.randn(3, 2, (4 + 2 * 2) * 8, device=device)
    cos, sin = (table.to(device) for table in rotary_tables(8, 16, 10000.0))
    position, slot = (torch.tensor(x, device=device) for x in ([3, 9, 14], [1, -1, 5]))
    results = []
    for append in (op, rope_kv_append):
        q_out, caches = torch.zeros(3, 2, 4, 8, device=device), _caches(device)
        append(q_out, *caches, qkv, cos, sin, position, slot)
        results.append((q_out, *caches))
    return _all_close(*results)


def _decode_attention(op: Op, device: str) -> bool:
    q = torch.randn(3, 2, 4, 8, device=device)
    k_cache, v_cache = torch.randn(2, 3, 8, 2, 8, device=device)
    kv_len = torch.tensor([8, 0, 3], device=device)
    got = op(q, k_cache, v_cache, kv_len, scale=0.3)
    return _close(got, decode_attention(q, k_cache, v_cache, kv_len, scale=0.3))


def _compact(op: Op, device: str) -> bool:
    exits = torch.tensor([True, False, False, True, False], device=device)
    alive = torch.tensor([True, True, False, False, True], device=device)
    return _all_close(op(exits, alive), compact(exits, alive))


SELF_TESTS: dict[str, Callable[[Op, str], bool]] = {
    "compact": _compact,
    "decode_attention": _decode_attention,
    "exit_decision": _exit_decision,
    "exit_gate": _exit_gate,
    "kv_append": _kv_append,
    "linear_small": _linear_small,
    "rms_norm": _rms_norm,
    "rope_kv_append": _rope_kv_append,
    "swiglu": _swiglu,
}
