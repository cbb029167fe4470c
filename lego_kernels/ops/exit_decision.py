"""The exit decision in one pass over the LM head: the logits are never in memory.

Native: csrc/cpu/exit_decision.cpp; lego_kernels/triton/exit_decision.py on CUDA. Shape letters:
B rows, D width, V rows of the head.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.exit_tiles import PARTIALS, TILE
from lego_kernels.gumbel import gumbel
from lego_kernels.library import LIB, TRITON_PROBLEM, define_op, refuse_grad
from lego_kernels.validation import DTYPES, check_dtype, check_rows, check_tensor, check_threshold

Criterion = Literal["max_prob", "margin", "entropy"]
CRITERIA = get_args(Criterion)

_OUT_DTYPES = (torch.int64, torch.float32, torch.float32, torch.bool)


class ExitDecision(NamedTuple):
    """What is decided for each row of exit states."""

    token: Tensor  # int64 [B]
    confidence: Tensor  # float32 [B]
    lse: Tensor  # float32 [B], log-sum-exp of the logits
    exit: Tensor  # bool [B]

    @classmethod
    def empty(cls, B: int, device: torch.device) -> "ExitDecision":
        confidence, lse = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(2))
        token = torch.empty(B, dtype=torch.int64, device=device)
        return cls(token, confidence, lse, torch.empty(B, dtype=torch.bool, device=device))


# 1. Kernel: plain torch, for any device without one of its own
def _exit_decision_torch(
    h: Tensor,
    head: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    threshold: Tensor,
    criterion: str,
    vocab_size: int,
    temperature: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    token: Tensor,
    confidence: Tensor,
    lse: Tensor,
    exit: Tensor,
    workspace: Tensor,
) -> None:
    _check_values(threshold, temperature)
    if norm_weight is not None:
        h = F.rms_norm(h, norm_weight.shape, norm_weight, eps)
    logits = F.linear(h, head[:vocab_size]).float()
    score = logits
    if temperature is not None:
        assert seed is not None and offset is not None
        score = logits + temperature.reshape(-1, 1) * gumbel(seed, offset, vocab_size)
    token.copy_(score.argmax(dim=-1))
    confidence.copy_(confidence_of(logits, criterion))
    lse.copy_(logits.logsumexp(dim=-1))
    exit.copy_(confidence >= threshold)


def _check_values(threshold: Tensor, temperature: Tensor | None) -> None:
    if threshold.is_cpu and bool(threshold.isnan().any()):
        raise ValueError("exit_decision: threshold must not be NaN, got nan")
    if temperature is not None and temperature.is_cpu:
        if not bool((temperature.isfinite() & (temperature >= 0)).all()):
            raise ValueError(
                f"exit_decision: temperature must be finite and >= 0, got {temperature.tolist()}"
            )


def confidence_of(logits: Tensor, criterion: str) -> Tensor:
    V = logits.size(1)
    logp = logits.log_softmax(dim=-1)
    if criterion == "entropy":
        # a masked token has p = 0 and log p = -inf: its term is 0, not NaN
        term = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
        confidence = (1 + term.sum(dim=-1) / math.log(max(V, 2))).clamp(0, 1)
    elif criterion == "margin" and V > 1:
        first, second = logp.exp().topk(2, dim=-1).values.unbind(1)
        confidence = first - second
    else:
        confidence = logp.amax(dim=-1).exp()
    return confidence.masked_fill((logits == -torch.inf).all(dim=-1), 0.0)


# 2. Launcher: in C++, or in lego_kernels/triton/exit_decision.py


# 3. Registration: schema, plain torch, Triton; the native library adds its own
_op = define_op(
    "exit_decision(Tensor h, Tensor head, Tensor? norm_weight, float eps, Tensor threshold, "
    "str criterion, int vocab_size, Tensor? temperature, Tensor? seed, Tensor? offset, "
    "Tensor(a!) token, Tensor(b!) confidence, Tensor(c!) lse, Tensor(d!) exit, "
    "Tensor(e!) workspace) -> ()",
    _exit_decision_torch,
)
if not TRITON_PROBLEM:
    from lego_kernels.triton.exit_decision import launch_exit_decision

    LIB.impl("exit_decision", launch_exit_decision, "CUDA")


# 4. Public wrapper: validate, then dispatch
def exit_decision(
    h: Tensor,
    head: Tensor,
    *,
    threshold: float | Tensor,
    criterion: Criterion = "max_prob",
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    vocab_size: int | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    out: ExitDecision | None = None,
    workspace: Tensor | None = None,
) -> ExitDecision:
    """Contract of lego.ops.exit_decision for float32, bfloat16 and float16.

    Logits, softmax and noise are float32 (plain torch, where there is no kernel, rounds the logits
    to h's dtype). A row's bits do not depend on the other rows, nor on
    how many there are. threshold and temperature are numbers or float32 [] or [B], seed and offset
    are numbers or int64 [] or [B]: as tensors on h's device they may change under a captured
    graph, and off the CPU their values are not checked, since that would make the host wait.
    With `out` and a `workspace` (exit_decision_workspace) and tensors for the numbers nothing is
    allocated; they must not overlap the inputs. Raises: ValueError also if a last stride is not 1.
    RuntimeError if an input requires grad in grad mode.
    """
    usual = _is_usual(h, head, norm_weight, threshold, out, workspace)
    if not usual:
        _check_inputs(h, head, norm_weight)
    threshold = check_threshold("exit_decision", threshold, h.size(0), like=h)
    vocab_size = head.size(0) if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= head.size(0):
        raise ValueError(
            f"exit_decision: vocab_size must be in [1, {head.size(0)}], got {vocab_size}"
        )
    if criterion not in CRITERIA:
        raise ValueError(
            f"exit_decision: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}"
        )
    if not eps >= 0:
        raise ValueError(f"exit_decision: eps must be >= 0, got {eps}")
    noise: tuple[Tensor | None, ...] = (None, None, None)
    if temperature is not None:
        if not isinstance(temperature, Tensor) and not 0 <= temperature < math.inf:
            raise ValueError(
                f"exit_decision: temperature must be finite and >= 0, got {temperature}"
            )
        B = h.size(0)
        noise = (
            check_rows("exit_decision", "temperature", temperature, B, torch.float32, like=h),
            check_rows("exit_decision", "seed", seed, B, torch.int64, like=h),
            check_rows("exit_decision", "offset", offset, B, torch.int64, like=h),
        )
    if out is None:
        out = ExitDecision.empty(h.size(0), h.device)
    elif not usual:
        _check_out(out, like=h)
    if workspace is None:
        workspace = exit_decision_workspace(h, head)
    elif not usual:
        _check_workspace(workspace, h, head)
    given = [x for x in (norm_weight, threshold, *noise) if x is not None]
    refuse_grad("exit_decision", h, head, *given)
    _op(h, head, norm_weight, eps, threshold, criterion, vocab_size, *noise, *out, workspace)
    return out


def exit_decision_workspace(h: Tensor, head: Tensor) -> Tensor:
    """Scratch for exit_decision on such tensors, or on any with fewer rows: float32 [size]."""
    return torch.empty(_workspace_size(h, head), dtype=torch.float32, device=h.device)


def _workspace_size(h: Tensor, head: Tensor) -> int:
    """PARTIALS values of each row and tile, and the normed row."""
    return h.size(0) * (-(-head.size(0) // TILE) * PARTIALS + h.size(1))


def _is_usual(
    h: Tensor,
    head: Tensor,
    norm_weight: Tensor | None,
    threshold: float | Tensor,
    out: ExitDecision | None,
    workspace: Tensor | None,
) -> bool:
    """Whether all checks would surely pass: one by one they are a tenth of the seed's call."""
    if out is None or workspace is None or not isinstance(threshold, Tensor):
        return False
    if h.dim() != 2 or head.dim() != 2:
        return False
    (B, D), (V, width) = h.shape, head.shape
    token, confidence, lse, exits = out
    dtype, device, norm = h.dtype, h.device, norm_weight
    return (
        width == D > 0 < V
        and dtype in DTYPES
        and head.dtype == dtype
        and (norm is None or (norm.shape == (D,) and norm.dtype == dtype and norm.device == device))
        and (norm is None or norm.is_contiguous())
        and threshold.shape in ((), (B,))
        and threshold.dtype == confidence.dtype == lse.dtype == workspace.dtype == torch.float32
        and token.dtype == torch.int64
        and exits.dtype == torch.bool
        and token.shape == confidence.shape == lse.shape == exits.shape == (B,)
        and workspace.dim() == 1
        and workspace.numel() >= _workspace_size(h, head)
        and head.device == threshold.device == workspace.device == device
        and token.device == confidence.device == lse.device == exits.device == device
        and h.is_contiguous()
        and head.is_contiguous()
        and token.is_contiguous()
        and confidence.is_contiguous()
        and lse.is_contiguous()
        and exits.is_contiguous()
        and workspace.is_contiguous()
    )


def _check_inputs(h: Tensor, head: Tensor, norm_weight: Tensor | None) -> None:
    if h.dim() != 2 or head.dim() != 2 or head.size(0) == 0 or h.size(1) == 0:
        raise ValueError(
            f"exit_decision: h must be [B, D] and head [V, D], "
            f"got {tuple(h.shape)} and {tuple(head.shape)}"
        )
    (B, D), V = h.shape, head.size(0)
    check_dtype("exit_decision", "h", h)
    check_tensor("exit_decision", "h", h, (B, D), like=h)
    check_tensor("exit_decision", "head", head, (V, D), like=h)
    if norm_weight is not None:
        check_tensor("exit_decision", "norm_weight", norm_weight, (D,), like=h)


def _check_out(out: ExitDecision, *, like: Tensor) -> None:
    for name, x, dtype in zip(ExitDecision._fields, out, _OUT_DTYPES, strict=True):
        check_tensor("exit_decision", f"out.{name}", x, like.shape[:1], like=like, dtype=dtype)


def _check_workspace(workspace: Tensor, h: Tensor, head: Tensor) -> None:
    size, needed = workspace.numel(), _workspace_size(h, head)
    check_tensor("exit_decision", "workspace", workspace, (size,), like=h, dtype=torch.float32)
    if size < needed:
        raise ValueError(
            f"exit_decision: workspace must have at least {needed} elements, got {size}"
        )
