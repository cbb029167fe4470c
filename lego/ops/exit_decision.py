"""The exit decision: token, confidence and exit flag from the exit state."""

# Shape letters: B = rows, V = vocabulary, D = model width.

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lego.ops.gumbel import gumbel
from lego.ops.rms_norm import rms_norm
from lego.ops.threshold import reaches

SoftmaxCriterion = Literal["max_prob", "margin", "entropy"]


def softmax_confidence(logits_BV: Tensor, criterion: SoftmaxCriterion) -> Tensor:
    """Return confidence_B in [0, 1], float32 (float64 for float64 logits).

    max_prob: p(top1). margin: p(top1) - p(top2), p(top2) = 0 if V = 1. entropy: 1 - H(p) / log V,
    which is 1 for a certain row and 0 for a uniform one (1 if V = 1).
    A row with a NaN gives NaN; a row of -inf alone gives 0.
    Raises: ValueError if logits are not [B, V] with V >= 1 or the criterion is unknown.
    Sources: Kaya et al. 2019, arXiv:1810.07052 (max_prob); Schuster et al. 2022, arXiv:2207.07061
    (margin); Teerapittayanon et al. 2016, arXiv:1709.01686 (entropy).
    """
    if logits_BV.dim() != 2 or logits_BV.size(1) == 0:
        raise ValueError(f"softmax_confidence: logits must be [B, V], got {tuple(logits_BV.shape)}")
    compute_dtype = torch.promote_types(logits_BV.dtype, torch.float32)
    logits_BV = logits_BV.to(compute_dtype)
    V = logits_BV.size(1)
    if criterion == "max_prob":
        confidence_B = logits_BV.softmax(dim=-1).amax(dim=-1)
    elif criterion == "margin":
        top_B2 = logits_BV.softmax(dim=-1).topk(min(2, V), dim=-1).values
        confidence_B = top_B2[:, 0] - top_B2[:, 1] if V > 1 else top_B2[:, 0]
    elif criterion == "entropy":
        logp_BV = logits_BV.log_softmax(dim=-1)
        # a masked token has p = 0 and log p = -inf: its term is 0, not NaN
        term_BV = torch.where(logp_BV == -torch.inf, 0.0, logp_BV.exp() * logp_BV)
        log_V = torch.tensor(float(max(V, 2)), dtype=compute_dtype).log().to(logits_BV.device)
        confidence_B = (1 + term_BV.sum(dim=-1) / log_V).clamp(0, 1)
    else:
        raise ValueError(
            f"softmax_confidence: criterion must be max_prob, margin or entropy, got {criterion!r}"
        )
    return confidence_B.masked_fill((logits_BV == -torch.inf).all(dim=-1), 0.0)


class ExitDecision(NamedTuple):
    """What is decided for each row of exit states."""

    token: Tensor  # int64 [B]
    confidence: Tensor  # float32 [B], float64 for float64 exit states
    lse: Tensor  # log-sum-exp of the logits, like confidence
    exit: Tensor  # bool [B]


def exit_decision(
    h_BD: Tensor,
    head_VD: Tensor,
    *,
    threshold: float | Tensor,
    criterion: SoftmaxCriterion = "max_prob",
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-5,
    vocab_size: int | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
) -> ExitDecision:
    """Decide the token of the exit states h_BD, and whether it is confident enough to exit.

    The logits are norm(h) @ head^T, without the norm if norm_weight_D is None, of the first
    vocab_size rows of the head (all, unless given: heads are padded at times). The token is the
    highest logit, or with a temperature (finite, >= 0) a draw from softmax(logits / temperature)
    by lego.ops.gumbel under seed and offset. The lowest id wins a tie and the first NaN over all.
    Confidence and lse are those of the logits at temperature 1. exit is confidence >= threshold,
    False where the confidence is NaN. threshold, temperature, seed and offset are numbers or [B]
    tensors, the latter two int64.
    Raises: ValueError if shapes do not fit or a number is out of its range.
    """
    if h_BD.dim() != 2 or head_VD.dim() != 2 or h_BD.size(1) != head_VD.size(1):
        raise ValueError(
            f"exit_decision: h must be [B, D] and head [V, D], "
            f"got {tuple(h_BD.shape)} and {tuple(head_VD.shape)}"
        )
    V = head_VD.size(0)
    vocab_size = V if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= V:
        raise ValueError(f"exit_decision: vocab_size must be in [1, {V}], got {vocab_size}")
    if norm_weight_D is not None:
        h_BD = rms_norm(h_BD, norm_weight_D, eps=eps)
    compute_dtype = torch.promote_types(h_BD.dtype, torch.float32)
    logits_BV = F.linear(h_BD, head_VD[:vocab_size]).to(compute_dtype)
    confidence_B = softmax_confidence(logits_BV, criterion)
    score_BV = logits_BV
    if temperature is not None:
        score_BV = perturbed(logits_BV, temperature, seed, offset)
    return ExitDecision(
        score_BV.argmax(dim=-1),
        confidence_B,
        logits_BV.logsumexp(dim=-1),
        reaches("exit_decision", confidence_B, threshold),
    )


def perturbed(
    logits_BV: Tensor, temperature: float | Tensor, seed: int | Tensor, offset: int | Tensor
) -> Tensor:
    """Return logits + temperature * Gumbel noise, [B, V]: its argmax is the draw.

    Scaling the noise, not the logits, makes temperature 0 the argmax and overflows nowhere.
    Raises: ValueError if the temperature is not finite and >= 0.
    """
    B, V = logits_BV.shape
    like = {"device": logits_BV.device}
    temperature = torch.as_tensor(temperature, dtype=logits_BV.dtype, **like).expand(B)
    if not bool((temperature.isfinite() & (temperature >= 0)).all()):
        raise ValueError(
            f"exit_decision: temperature must be finite and >= 0, got {temperature.tolist()}"
        )
    seed_B = torch.as_tensor(seed, dtype=torch.int64, **like).expand(B)
    offset_B = torch.as_tensor(offset, dtype=torch.int64, **like).expand(B)
    return logits_BV + temperature[:, None] * gumbel(seed_B, offset_B, V).to(logits_BV.dtype)
