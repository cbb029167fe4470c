"""Does the promise hold? Over 300 draws of sequences, how often is a certified risk above epsilon?

The true mean risks are known: of synthetic risks by their making; of a trained model's, since a
cached pool of its sequences is itself the population that is drawn from. A rate above delta plus
three binomial standard errors is a broken promise. The same check must catch broken procedures.
"""

# Shape letters: R = draws, N = sequences, G = thresholds.

import functools
import itertools
import math

import numpy as np
import pytest

from lego.certificate import hoeffding_bentkus, num_certified
from lego.checkpoint import load_checkpoint
from lego.engine import engine_for
from lego.run_folder import RunFolder
from lego.sequence_risk import default_grid, disagreement, draw_sequences, excess_loss
from lego.strategies import EarlyExit
from tests.runs import finished_run

DRAWS, SEQUENCES, THRESHOLDS = 300, 250, 12
EPSILONS, DELTAS = (0.02, 0.05, 0.1), (0.05, 0.2)
LEVELS = list(itertools.product(EPSILONS, DELTAS))


def allowed(delta):
    return delta + 3 * math.sqrt(delta * (1 - delta) / DRAWS)


def certified(mean_RG, epsilon, delta, p_value=hoeffding_bentkus, num_passed=num_certified):
    """How many thresholds pass in each draw, [R]."""
    return num_passed(p_value(mean_RG, SEQUENCES, epsilon), delta)


def violation_rate(mean_RG, true_RG, epsilon, delta, **broken):
    """Share of draws whose certified threshold has a true mean risk of epsilon or more.

    Exactly epsilon is no broken promise yet, but any risk above it is: a proof for > epsilon holds
    at epsilon too, and that is where it is hardest.
    """
    count_R = certified(mean_RG, epsilon, delta, **broken)
    last_R = true_RG[np.arange(DRAWS), np.maximum(count_R, 1) - 1]
    return np.mean((count_R > 0) & (last_R >= epsilon * (1 - 1e-12)))


def bernoulli_at_epsilon(draw, epsilon):
    """Hardest: every threshold is exactly as risky as it must not be, each on its own."""
    true_G = np.full(THRESHOLDS, epsilon)
    return draw.random((DRAWS, SEQUENCES, THRESHOLDS)) < true_G, true_G


def bernoulli_rising(draw, epsilon):
    """A bolder threshold errs wherever a safer one does."""
    true_G = np.linspace(0, 2.2 * epsilon, THRESHOLDS)
    return draw.random((DRAWS, SEQUENCES, 1)) < true_G, true_G


def shares(draw, epsilon):
    """Ten tokens a sequence, each wrong on its own."""
    true_G = np.linspace(0.5 * epsilon, 1.5 * epsilon, THRESHOLDS)
    return draw.binomial(10, true_G, (DRAWS, SEQUENCES, THRESHOLDS)) / 10, true_G


def skewed(draw, epsilon):
    """Most sequences have nearly no risk, a few nearly all of it."""
    true_G = np.linspace(0.6 * epsilon, 1.4 * epsilon, THRESHOLDS)
    return draw.beta(0.3 * true_G, 0.3 * (1 - true_G), (DRAWS, SEQUENCES, THRESHOLDS)), true_G


def not_monotone(draw, epsilon):
    """Safe, then risky, then safe again."""
    true_G = epsilon * (1 + np.sin(np.arange(THRESHOLDS)))
    return draw.random((DRAWS, SEQUENCES, THRESHOLDS)) < true_G, true_G


def constant(draw, epsilon):
    """No noise at all."""
    true_G = epsilon * np.linspace(0.9, 1.1, THRESHOLDS)
    return np.broadcast_to(true_G, (DRAWS, SEQUENCES, THRESHOLDS)), true_G


SYNTHETIC = (bernoulli_at_epsilon, bernoulli_rising, shares, skewed, not_monotone, constant)


@functools.cache
def synthetic(risks, epsilon):
    """(observed means, true means), each [R, G]."""
    risk_RNG, true_G = risks(np.random.default_rng(round(1000 * epsilon)), epsilon)
    return risk_RNG.mean(axis=1), np.broadcast_to(true_G, (DRAWS, THRESHOLDS))


@functools.cache
def pool(kind):
    """Risks [G, N] of 500 sequences of a trained model: the whole population."""
    folder, _, cache, *_ = finished_run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(cache))
        ids = RunFolder(folder).corpus().train.ids
    checkpoint = load_checkpoint(folder / "checkpoint")
    model, strategy = checkpoint.model, EarlyExit(threshold=1, criterion="gate")
    grid = default_grid(model, ids, 16, strategy.criterion)
    drawn = draw_sequences(ids, checkpoint.tokenizer.end_of_text_id, 500, 8)
    if kind == "loss":
        return excess_loss(model, drawn.ids, 2, strategy, grid, bound=1).risk
    engine = engine_for(model, strategy, "auto")
    return disagreement(model, drawn.ids[:, :4], 6, strategy, grid, engine=engine).risk


@functools.cache
def drawn_from_pool(kind):
    """(observed means, true means), each [R, G], of draws with replacement."""
    risk_GN = pool(kind)
    draw = np.random.default_rng(7)
    index_RN = draw.integers(risk_GN.shape[1], size=(DRAWS, SEQUENCES))
    mean_RG = np.stack([risk_N[index_RN].mean(axis=1) for risk_N in risk_GN], axis=1)
    return mean_RG, np.broadcast_to(risk_GN.mean(axis=1), mean_RG.shape)


@pytest.mark.parametrize(("epsilon", "delta"), LEVELS)
@pytest.mark.parametrize("risks", SYNTHETIC, ids=lambda risks: risks.__name__)
def test_synthetic_risks(risks, epsilon, delta):
    assert violation_rate(*synthetic(risks, epsilon), epsilon, delta) <= allowed(delta)


@pytest.mark.parametrize(("epsilon", "delta"), LEVELS)
def test_risks_of_a_model(epsilon, delta):
    """Its mean risks run through epsilon, and most draws certify something."""
    mean_RG, true_RG = drawn_from_pool("disagreement")
    assert true_RG[0, 0] < epsilon < true_RG[0, -1]
    assert violation_rate(mean_RG, true_RG, epsilon, delta) <= allowed(delta)
    assert np.mean(certified(mean_RG, epsilon, delta) > 0) > 0.5


@pytest.mark.parametrize("delta", DELTAS)
def test_losses_of_a_model(delta):
    """A small excess, as bounded losses have it: epsilon is put in its midst."""
    mean_RG, true_RG = drawn_from_pool("loss")
    for epsilon in np.quantile(true_RG[0], [0.5, 0.8]):
        assert violation_rate(mean_RG, true_RG, epsilon, delta) <= allowed(delta)


@pytest.mark.parametrize("kind", ["disagreement", "loss"])
def test_halves_of_a_model(kind):
    """Calibrated on a random half and tested on the other: never far above epsilon.

    The other half's mean is off the true one by up to three standard errors of its own.
    """
    risk_GN, draw, epsilon, delta = pool(kind), np.random.default_rng(3), 0.05, 0.05
    violated = 0
    for _ in range(DRAWS):
        order_N = draw.permutation(risk_GN.shape[1])
        ours, theirs = risk_GN[:, order_N[:SEQUENCES]], risk_GN[:, order_N[SEQUENCES:]]
        count = certified(ours.mean(axis=1), epsilon, delta)
        if count:
            error = theirs[count - 1].std() / math.sqrt(theirs.shape[1])
            violated += theirs[count - 1].mean() > epsilon + 3 * error
    assert violated / DRAWS <= allowed(delta)


def plain_mean(mean, n, epsilon):
    """Certifies whatever looks good enough."""
    return np.where(np.asarray(mean) <= epsilon, 0.0, 1.0)


def no_square(mean, n, epsilon):
    """Hoeffding's exponent without its square."""
    return np.exp(-2 * n * np.maximum(epsilon - np.asarray(mean), 0))


def tokens_as_units(mean, n, epsilon):
    """As if the ten tokens of a sequence were independent."""
    return hoeffding_bentkus(mean, 10 * n, epsilon)


def boldest_that_passes(p_values, delta):
    """Every threshold has its own chance of delta, and failures do not end it."""
    passed = p_values <= delta
    return np.where(passed.any(axis=-1), THRESHOLDS - passed[..., ::-1].argmax(axis=-1), 0)


@pytest.mark.parametrize(
    "broken",
    [
        {"p_value": plain_mean},
        {"p_value": no_square},
        {"p_value": tokens_as_units},
        {"num_passed": boldest_that_passes},
    ],
    ids=lambda broken: next(iter(broken.values())).__name__,
)
def test_the_check_catches_what_is_broken(broken):
    """At five of the six levels at least: 250 sequences make few chances at the strictest."""
    caught = 0
    for epsilon, delta in LEVELS:
        rate = violation_rate(*synthetic(bernoulli_at_epsilon, epsilon), epsilon, delta, **broken)
        caught += rate > allowed(delta)
    assert caught >= len(LEVELS) - 1


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_it_is_not_too_careful(epsilon):
    """A threshold with a third of the risk allowed is certified in most draws, delta = 0.2."""
    mean_RG, true_RG = synthetic(bernoulli_rising, epsilon)
    count_R = certified(mean_RG, epsilon, 0.2)
    certified_R = true_RG[np.arange(DRAWS), np.maximum(count_R, 1) - 1] * (count_R > 0)
    assert np.mean(certified_R >= epsilon / 3) > 0.8
