"""Drawing tokens: greedy, and against the distributions that the options define."""

import math

import pytest
import torch

from lego.sampling import Sampler, Sampling, token_probabilities

INF, NAN = math.inf, math.nan
LOGITS = [0.3, 2.0, -1.0, 1.5, 0.0, 1.1, -INF, 0.9]


def naive(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities by id, from Python floats; no two logits may be equal."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: top_k or None]
    weight = {i: math.exp(logits[i] / temperature) for i in kept}
    total = math.fsum(weight.values())
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += weight[i] / total
    return [weight[i] / total / mass if i in nucleus else 0.0 for i in range(len(logits))]


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.7, "top_k": 5, "top_p": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distribution_is_its_definition(options):
    logits = torch.tensor([LOGITS, LOGITS[::-1]], dtype=torch.float64)
    got = token_probabilities(logits, Sampling(**options))
    expected = torch.tensor([naive(row, **options) for row in logits.tolist()]).double()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def critical_value(degrees):
    """Chi-squared at p = 1e-6 (Wilson and Hilferty): the seeds are fixed, so this never flakes."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.75 * spread**0.5) ** 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options):
    draws = 4000
    sampler = Sampler(Sampling(seed=3, **options), 2)
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    for row in range(2):
        drawn = sampler.draw(logits[row].expand(draws, 8), [row] * draws)  # one after another
        expected = torch.tensor(naive(logits[row].tolist(), **options)) * draws
        seen = torch.bincount(torch.tensor(drawn), minlength=8)
        possible = expected > 0
        assert not seen[~possible].any()
        statistic = ((seen - expected).square() / expected)[possible].sum()
        assert statistic < critical_value(max(int(possible.sum()) - 1, 1))


def test_greedy_takes_the_lowest_of_the_best():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -3.0, -INF, 5.0]])
    assert Sampler(Sampling(), 3).draw(logits, [0, 1, 2]) == [1, 0, 3]
    assert Sampler(Sampling(top_k=1, top_p=0.1, seed=7), 3).draw(logits, [0, 1, 2]) == [1, 0, 3]
    assert Sampler(Sampling(temperature=1.0, top_k=1), 3).draw(logits, [0, 1, 2])[2] == 3


def test_top_k_keeps_all_that_tie_with_the_last():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    got = token_probabilities(logits, Sampling(temperature=1.0, top_k=2))[0]
    e = math.e
    torch.testing.assert_close(
        got, torch.tensor([e**2, e, e, e, 0.0], dtype=torch.float64) / (e**2 + 3 * e)
    )


@pytest.mark.parametrize("top_p", [1e-12, 0.2, 0.5])
def test_top_p_keeps_the_first_token_always(top_p):
    logits = torch.tensor([[0.0, 0.0, 5.0], [0.0, -INF, -INF]])
    got = token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    assert got.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_top_p_stops_where_the_mass_is_reached():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 4)]:
        got = token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
        assert (got > 0).sum() == kept
        torch.testing.assert_close(got.sum(), torch.tensor(1.0).double())


def test_same_seed_same_tokens():
    logits = torch.randn(30, 3, 40, generator=torch.Generator().manual_seed(0))

    def tokens(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 3)
        return [sampler.draw(step, [0, 1, 2]) for step in logits]

    assert tokens(11) == tokens(11) and tokens(11) != tokens(12)
    rows = list(zip(*tokens(0), strict=True))
    assert len(set(rows)) == 3
    same = torch.zeros(2, 1000)
    first, second = Sampler(Sampling(temperature=1.0, seed=1), 2).draw(same, [0, 1])
    assert first != second  # rows draw from generators of their own


def test_a_row_draws_the_same_whoever_is_alive():
    logits = torch.randn(20, 3, 40, generator=torch.Generator().manual_seed(0))
    together = Sampler(Sampling(temperature=1.0, seed=5), 3)
    expected = [together.draw(step, [0, 1, 2])[2] for step in logits]
    leaving = Sampler(Sampling(temperature=1.0, seed=5), 3)
    got = []
    for t, step in enumerate(logits):
        alive = [0, 1, 2] if t < 4 else [1, 2] if t < 9 else [2]
        got.append(leaving.draw(step[alive], alive)[-1])
    assert got == expected


def test_the_largest_seed_serves_every_row():
    sampler = Sampler(Sampling(temperature=1.0, seed=2**63 - 1), 5)
    assert all(0 <= token < 9 for token in sampler.draw(torch.zeros(5, 9), list(range(5))))


def test_bfloat16_logits():
    logits = torch.tensor([LOGITS]).bfloat16()
    got = token_probabilities(logits, Sampling(temperature=1.0))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got[0].tolist(), naive(logits[0].tolist()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e-39, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    """Logits over it overflow; a token outside the vocabulary must not come of that."""
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    sampler = Sampler(Sampling(temperature=temperature), 2)
    assert sampler.draw(logits, [0, 1]) == [2, 0]


REFUSED = {
    "Sampling.temperature: must be finite and >= 0, got -0.1": {"temperature": -0.1},
    "Sampling.temperature: must be finite and >= 0, got nan": {"temperature": NAN},
    "Sampling.temperature: must be finite and >= 0, got inf": {"temperature": INF},
    "Sampling.top_k: must be >= 0, got -1": {"top_k": -1},
    "Sampling.top_p: must be in (0, 1], got 0": {"top_p": 0},
    "Sampling.top_p: must be in (0, 1], got 1.1": {"top_p": 1.1},
    "Sampling.top_p: must be in (0, 1], got nan": {"top_p": NAN},
    "Sampling.seed: must be in [0, 2**63), got -1": {"seed": -1},
    f"Sampling.seed: must be in [0, 2**63), got {2**63}": {"seed": 2**63},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses(sentence):
    with pytest.raises(ValueError) as caught:
        Sampling(**REFUSED[sentence])
    assert str(caught.value) == sentence
