"""Learn then Test: a threshold with a promise, and the file that keeps it.

The risk of every sequence lies in [0, 1]. For each threshold of a grid, fixed before the data are
seen, a p-value tests "the mean risk exceeds epsilon". Thresholds are tested from the safest on,
each at level delta, until one does not pass; the last that passed is certified. With probability
>= 1 - delta over the sequences, the mean risk of the certified threshold is <= epsilon. Sequences
have to be exchangeable with those to come; nothing else is assumed of them, and bolder thresholds
need not be riskier ones.

Sources: Angelopoulos, Bates, Candes, Jordan, Lei 2021, arXiv:2110.01052 (Learn then Test); Schuster
et al. 2022, arXiv:2207.07061 (early exit); Bates et al. 2021, arXiv:2101.02703 (the p-value).
"""

# Shape letters: G = thresholds, N = sequences.

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lego.config import Criterion, KVPolicy
from lego.files import to_json, write_text

Risk = Literal["disagreement", "loss"]
FILE_NAME = "certificate.json"
_FORMAT = 1


def hoeffding_bentkus(mean_risk: ArrayLike, num_sequences: int, epsilon: float) -> np.ndarray:
    """p-values, float64 in (0, 1], of "the mean is > epsilon" for risks in [0, 1].

    mean_risk: observed means in [0, 1], of any shape, each over num_sequences >= 1 sequences, which
    are independent or drawn without replacement. epsilon is in (0, 1).
    Sources: Hoeffding 1963; Bentkus 2004; as one p-value, Bates et al. 2021, arXiv:2101.02703.
    """
    from scipy import stats  # 0.8 s to import, which every other command would pay

    mean, n = np.asarray(mean_risk, dtype=np.float64), num_sequences
    hoeffding = np.exp(-n * _divergence(np.minimum(mean, epsilon), epsilon))
    # three risks of 0.1 sum to 0.30000000000000004: a rounding error is no further sequence
    total = np.ceil(np.round(n * mean, 9))
    bentkus = math.e * stats.binom.cdf(total, n, epsilon)
    return np.minimum(1.0, np.minimum(hoeffding, bentkus))


def _divergence(mean_risk: ArrayLike, epsilon: float) -> np.ndarray:
    """Kullback-Leibler divergence, in nats, of a coin of mean epsilon from one of mean_risk."""
    from scipy import special

    mean = np.asarray(mean_risk, dtype=np.float64)
    return special.rel_entr(mean, epsilon) + special.rel_entr(1 - mean, 1 - epsilon)


def num_certified(p_values: ArrayLike, delta: float) -> np.ndarray:
    """How many thresholds pass, int64 [...], of p-values [..., G] from the safest to the boldest.

    Fixed-sequence testing: the first p-value above delta ends it, whatever comes after.
    """
    passed = np.asarray(p_values) <= delta
    return np.logical_and.accumulate(passed, axis=-1).sum(axis=-1)


def sequences_needed(epsilon: float, delta: float, mean_risk: float = 0.0) -> int:
    """How many sequences let a threshold pass, if this is their mean risk, which is < epsilon.

    For mean_risk 0 there is no smaller number; otherwise a few less may do.
    """
    divergence = float(_divergence(mean_risk, epsilon))
    count = max(1, math.floor(math.log(1 / delta) / divergence))
    # as the p-value has it, whatever the quotient was rounded to
    return count if math.exp(-count * divergence) <= delta else count + 1


def smallest_epsilon(mean_risk: float, num_sequences: int, delta: float) -> float:
    """The epsilon from which on this mean risk passes; 1 if there is none below."""
    from scipy import optimize

    def excess(epsilon: float) -> float:
        return float(hoeffding_bentkus(mean_risk, num_sequences, epsilon)) - delta

    low, high = max(mean_risk, 1e-12), 1 - 1e-12
    return float(optimize.brentq(excess, low, high)) if excess(high) < 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class TestedThreshold:
    """What was found at one threshold of the grid."""

    threshold: float
    mean_risk: float
    p_value: float
    shallow_ratio: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was promised, of what, and from what it follows.

    threshold is None if none passed: then nothing is promised, and nothing is saved.
    """

    risk: Risk
    epsilon: float
    delta: float
    threshold: float | None
    grid: tuple[TestedThreshold, ...]  # thresholds descend: the safest comes first
    num_sequences: int
    num_documents: int  # that the sequences came from
    criterion: Criterion
    kv_policy: KVPolicy
    prompt_tokens: int
    max_new_tokens: int
    loss_bound: float | None  # nats a token that are a risk of 1; None for disagreement
    engine: str
    model_sha256: str  # of config.json and model.safetensors
    data_sha256: str  # of the ids of the calibration split
    environment: dict[str, Any]

    @property
    def certified(self) -> TestedThreshold:
        """The grid's entry of the threshold, which must not be None."""
        return next(entry for entry in self.grid if entry.threshold == self.threshold)


def learn_then_test(
    thresholds: Sequence[float],
    risk_GN: np.ndarray,
    shallow_ratio_G: np.ndarray,
    *,
    epsilon: float,
    delta: float,
) -> tuple[float | None, tuple[TestedThreshold, ...]]:
    """The boldest threshold that can be promised, None if none can, and what was found at each.

    thresholds descend strictly. risk_GN is in [0, 1], shallow_ratio_G is only passed on.
    Raises: ValueError if one of these does not hold or a level is not in (0, 1).
    """
    check_levels(epsilon, delta)
    if any(a <= b for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise ValueError(f"learn_then_test: thresholds must descend, got {tuple(thresholds)}")
    if risk_GN.ndim != 2 or len(risk_GN) != len(thresholds) or risk_GN.size == 0:
        raise ValueError(
            f"learn_then_test: risk must be [{len(thresholds)}, N] with N >= 1, got {risk_GN.shape}"
        )
    if not (risk_GN.min() >= 0 and risk_GN.max() <= 1):
        raise ValueError(
            f"learn_then_test: risk must be in [0, 1], got {risk_GN.min()} to {risk_GN.max()}"
        )
    mean_G = risk_GN.mean(axis=1)
    p_value_G = hoeffding_bentkus(mean_G, risk_GN.shape[1], epsilon)
    passed = int(num_certified(p_value_G, delta))
    columns = (mean_G.tolist(), p_value_G.tolist(), shallow_ratio_G.tolist())
    grid = tuple(
        TestedThreshold(threshold=t, mean_risk=mean, p_value=p, shallow_ratio=ratio)
        for t, mean, p, ratio in zip(thresholds, *columns, strict=True)
    )
    return (grid[passed - 1].threshold if passed else None), grid


def check_levels(epsilon: float, delta: float) -> None:
    """Raise ValueError unless both are in (0, 1)."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"calibrate: {name} must be in (0, 1), got {value}")


def save_certificate(folder: Path, certificate: Certificate) -> None:
    """Write certificate.json into a checkpoint folder; if no threshold passed, remove an old one.

    Whoever has just been told that nothing can be promised must not go on with an older promise.
    """
    if certificate.threshold is None:
        (folder / FILE_NAME).unlink(missing_ok=True)
    else:
        write_text(folder / FILE_NAME, to_json({"format": _FORMAT} | asdict(certificate)))


def load_certificate(folder: Path) -> Certificate:
    """Read the certificate of a checkpoint folder and check that it still belongs to it.

    Raises: ValueError if there is none, it is damaged, or the model has changed since.
    """
    path = folder / FILE_NAME
    remedy = "make one with `lego calibrate`"
    if not path.is_file():
        raise ValueError(f"certificate: {folder} must hold {FILE_NAME}, got none; {remedy}")
    try:
        certificate = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"certificate: {path} must be as `lego calibrate` wrote it, got {error!r}; {remedy}"
        ) from error
    model_sha256 = hash_model(folder)
    if certificate.model_sha256 != model_sha256:
        raise ValueError(
            f"certificate: {path} must be of this model, SHA-256 {model_sha256}, got one of "
            f"{certificate.model_sha256}; {remedy}"
        )
    return certificate


def _parse(values: dict[str, Any]) -> Certificate:
    """The certificate in these values; an error says what is wrong with them."""
    values = dict(values)
    if (found := values.pop("format")) != _FORMAT:
        raise ValueError(f"format {found}, not {_FORMAT}")
    values["grid"] = tuple(TestedThreshold(**entry) for entry in values["grid"])
    certificate = Certificate(**values)
    for name, choices in (("risk", Risk), ("criterion", Criterion), ("kv_policy", KVPolicy)):
        if values[name] not in get_args(choices):
            raise ValueError(f"{name} {values[name]!r}")
    for name in ("num_sequences", "num_documents", "prompt_tokens", "max_new_tokens"):
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{name} {values[name]!r}")
    check_levels(certificate.epsilon, certificate.delta)
    # the promise must follow from what was found
    means, p_values = ([getattr(e, k) for e in certificate.grid] for k in ("mean_risk", "p_value"))
    again = hoeffding_bentkus(means, certificate.num_sequences, certificate.epsilon)
    if not np.allclose(p_values, again, rtol=1e-6, atol=0):
        raise ValueError("p-values that do not follow from the risks")
    passed = int(num_certified(p_values, certificate.delta))
    if passed == 0 or certificate.threshold != certificate.grid[passed - 1].threshold:
        raise ValueError(f"threshold {certificate.threshold}, which did not pass")
    return certificate


def hash_model(folder: Path) -> str:
    """SHA-256 of config.json and model.safetensors of a checkpoint folder, one after the other."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_ids(ids: np.ndarray) -> str:
    """SHA-256 of token ids [num_ids], whatever integers they are kept in."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<u4").tobytes()).hexdigest()
