"""Inputs of rope_kv_append, and the check of one call, for every test of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lego.ops.rope_kv_append import rope_kv_append as reference
from lego.ops.rotary import rotary_tables
from tests.oracle import FLOORS, assert_error_bounded, assert_same_bits, random

WRITTEN = ("q_out", "k_cache", "v_cache")


class Shape(NamedTuple):
    B: int = 3
    T: int = 2
    S: int = 6
    P: int = 9
    Hq: int = 4
    Hkv: int = 2
    E: int = 8


USUAL = Shape()
# smallest, odd, halves one over a vector, the widest accesses of each dtype, many tokens and heads,
# queries alone
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 2),
    Shape(3, 2, 5, 7, 3, 1, 6),
    Shape(2, 1, 9, 12, 4, 2, 34),
    Shape(2, 3, 64, 40, 9, 3, 64),
    Shape(1, 33, 40, 50, 4, 4, 16),
    Shape(2, 3, 6, 9, 4, 0, 16),
]


def make(
    shape: Shape = USUAL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    norm: bool = False,
    layout: str = "dense",
) -> dict[str, Any]:
    """All arguments: rows at the first, the last and a middle place, one of them without a slot.

    Layouts: dense; strided, where no tensor is contiguous; unaligned, where all are, but start one
    element after a wider boundary.
    """
    B, T, S, P, Hq, Hkv, E = shape
    width = (Hq + 2 * Hkv) * E
    if layout == "strided":
        q_out = random((B, Hq, T, E), dtype, device).transpose(1, 2)
        k_cache, v_cache = random((B, Hkv, S, 2, E), dtype, device).transpose(1, 2).unbind(3)
        qkv = random((B, T + 2, width + 16), dtype, device, seed=1)[:, 2:, 8 : 8 + width]
        tables = [torch.cat((x, x), dim=1)[:, : E // 2] for x in rotary_tables(E, P, 100.0)]
    else:
        skip = int(layout == "unaligned")
        q_out = _flat(B * T * Hq * E, dtype, device, skip).view(B, T, Hq, E)
        k_cache, v_cache = (_flat(B * S * Hkv * E, dtype, device, skip) for _ in range(2))
        k_cache, v_cache = k_cache.view(B, S, Hkv, E), v_cache.view(B, S, Hkv, E)
        qkv = _flat(B * T * width, dtype, device, skip, seed=1).view(B, T, width)
        tables = list(rotary_tables(E, P, 100.0))
    position = [[(0, P - T, (P - T) // 2)[b % 3], 99] for b in range(B)]
    slot = [[(S - T, -3, (S - T) // 2)[b % 3], 99] for b in range(B)]
    arguments: dict[str, Any] = {
        "q_out": q_out.fill_(float("nan")),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "qkv": qkv,
        "cos": tables[0].to(device),
        "sin": tables[1].to(device),
        "position": torch.tensor(position, dtype=torch.int64, device=device).reshape(B, 2)[:, 0],
        "slot": torch.tensor(slot, dtype=torch.int64, device=device).reshape(B, 2)[:, 0],
    }
    if norm:
        arguments["q_norm"] = random((E,), dtype, device, seed=2)
        arguments["k_norm"] = random((E,), dtype, device, seed=3)
    return arguments


def _flat(size: int, dtype: torch.dtype, device: str, skip: int, seed: int = 0) -> Tensor:
    return random((size + skip,), dtype, device, seed=seed)[skip:]


def run_reference(**arguments: Any) -> None:
    """The reference under the names that the kernels' arguments have."""
    norms = {f"{name}_E": arguments.pop(name, None) for name in ("q_norm", "k_norm")}
    eps = {name: arguments.pop(name) for name in ("eps",) if name in arguments}
    reference(*arguments.values(), **norms, **eps)


def expected(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What the reference writes, in the dtype of the arguments or in another."""
    given = dict(arguments)
    for name in (*WRITTEN, "qkv", "q_norm", "k_norm"):
        if name in given:
            given[name] = arguments[name].to(dtype or arguments[name].dtype, copy=name in WRITTEN)
    run_reference(**given)
    return given


def check(op: Callable[..., None], arguments: dict[str, Any]) -> None:
    """One call: queries and keys within eager's error, values and all other slots to the bit."""
    exact, eager = expected(arguments, torch.float64), expected(arguments)
    before = {name: arguments[name].clone() for name in WRITTEN}
    op(**arguments)
    B, T = arguments["qkv"].shape[:2]
    slot = arguments["slot"].cpu()
    appended = torch.zeros(arguments["k_cache"].shape[:2], dtype=torch.bool)
    for b in (slot >= 0).nonzero().flatten().tolist():
        appended[b, slot[b] : slot[b] + T] = True
    appended = appended.to(arguments["qkv"].device)
    assert_same_bits(arguments["v_cache"], eager["v_cache"])
    assert_same_bits(arguments["k_cache"][~appended], before["k_cache"][~appended])
    for name, x in (("q_out", slice(None)), ("k_cache", appended)):
        got, close, true = arguments[name][x], eager[name][x], exact[name][x]
        if got.numel() > 0:
            floor = FLOORS[got.dtype] * true.abs().max().item()
            assert_error_bounded(got, close, true, floor=floor)
