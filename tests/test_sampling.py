"""Drawing tokens: greedy, and against the distributions that the options define."""

import math

import pytest
import torch

from lego.ops.gumbel import gumbel
from lego.sampling import Sampling, draw, kept_logits, row_seed

INF, NAN = math.inf, math.nan
LOGITS = [0.3, 2.0, -1.0, 1.5, 0.0, 1.1, -INF, 0.9]


def probabilities(logits, **options):
    """What a draw from the kept logits follows, float64."""
    kept = kept_logits(logits, Sampling(**options))
    assert kept.dtype == logits.dtype
    return (kept.double() / options["temperature"]).softmax(dim=-1)


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
    got = probabilities(logits, **options)
    expected = torch.tensor([naive(row, **options) for row in logits.tolist()]).double()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def critical_value(degrees):
    """Chi-squared at p = 1e-6 (Wilson and Hilferty): the seeds are fixed, so this never flakes."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.75 * spread**0.5) ** 3


@pytest.mark.parametrize("by", ["position", "row"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options, by):
    """Along a sequence, and across the sequences of a batch at one position."""
    draws = 4000
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    for row in range(2):
        many, same = range(draws), [row] * draws
        rows, positions = (same, many) if by == "position" else (many, same)
        drawn = draw(logits[row].expand(draws, 8), Sampling(seed=3, **options), rows, positions)
        expected = torch.tensor(naive(logits[row].tolist(), **options)) * draws
        seen = torch.bincount(torch.tensor(drawn), minlength=8)
        possible = expected > 0
        assert not seen[~possible].any()
        statistic = ((seen - expected).square() / expected)[possible].sum()
        assert statistic < critical_value(max(int(possible.sum()) - 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_draw_is_the_best_of_logits_and_noise(dtype):
    """The definition, on which the engines agree: noise of (row seed, position, token)."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, positions = [0, 1, 2, 2, 7, 0], [0, 5, 5, 6, 2**33, 5]
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 11}
    drawn = draw(logits, Sampling(**options), rows, positions)
    for token, logits_V, row, position in zip(drawn, logits, rows, positions, strict=True):
        seed = torch.tensor([row_seed(11, row)])
        noise = gumbel(seed, torch.tensor([position]), 40)[0]
        score = (logits_V.double() + 0.8 * noise).tolist()
        kept = kept_logits(logits_V[None], Sampling(**options))[0] > -INF
        assert token == max((i for i in range(40) if kept[i]), key=lambda i: score[i])


def test_row_seed():
    assert [row_seed(seed, 0) for seed in (0, 5, 2**63 - 1)] == [0, 5, 2**63 - 1]
    assert row_seed(0, 1) == 0x9E3779B97F4A7C15 - 2**64
    assert row_seed(3, 2) == 3 + 2 * 0x9E3779B97F4A7C15 - 2**64
    for seed in (0, 3, 2**63 - 1):
        seeds = [row_seed(seed, row) for row in range(1000)]
        assert len(set(seeds)) == 1000 and all(-(2**63) <= x < 2**63 for x in seeds)


def test_greedy_takes_the_lowest_of_the_best():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -3.0, -INF, 5.0]])
    at = ([0, 1, 2], [4, 4, 9])
    assert draw(logits, Sampling(), *at) == [1, 0, 3]
    assert draw(logits, Sampling(top_k=1, top_p=0.1, seed=7), *at) == [1, 0, 3]
    assert draw(logits, Sampling(temperature=1.0, top_k=1), *at)[2] == 3


def test_top_k_keeps_all_that_tie_with_the_last():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    got = probabilities(logits, temperature=1.0, top_k=2)[0]
    e = math.e
    torch.testing.assert_close(
        got, torch.tensor([e**2, e, e, e, 0.0], dtype=torch.float64) / (e**2 + 3 * e)
    )


@pytest.mark.parametrize("num_rows", [1, 3])
def test_top_p_keeps_the_lowest_ids_of_a_tie(num_rows):
    """Whatever else is sorted with them: 500 is more than a sort that is stable by luck."""
    logits = torch.zeros(num_rows, 500).double()
    kept = kept_logits(logits, Sampling(temperature=1.0, top_p=0.1 - 1e-6)) > -INF
    assert kept[:, :50].all() and not kept[:, 50:].any()


@pytest.mark.parametrize("top_p", [1e-12, 0.2, 0.5])
def test_top_p_keeps_the_first_token_always(top_p):
    logits = torch.tensor([[0.0, 0.0, 5.0], [0.0, -INF, -INF]])
    got = probabilities(logits, temperature=1.0, top_p=top_p)
    assert got.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_top_p_stops_where_the_mass_is_reached():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 4)]:
        got = probabilities(logits, temperature=1.0, top_p=top_p)
        assert (got > 0).sum() == kept
        torch.testing.assert_close(got.sum(), torch.tensor(1.0).double())


def test_same_seed_same_tokens():
    logits = torch.randn(30, 3, 40, generator=torch.Generator().manual_seed(0))

    def tokens(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return [draw(step, sampling, [0, 1, 2], [t] * 3) for t, step in enumerate(logits)]

    assert tokens(11) == tokens(11) and tokens(11) != tokens(12)
    assert len(set(zip(*tokens(0), strict=True))) == 3
    same = torch.zeros(4, 1000)
    drawn = draw(same, Sampling(temperature=1.0, seed=1), [0, 1, 0, 1], [5, 5, 6, 6])
    assert len(set(drawn)) == 4  # rows and positions have noise of their own


def test_a_row_draws_the_same_in_any_batch():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=5)
    rows, positions = [0, 1, 2, 3, 4], [9, 2, 7, 7, 0]
    together = draw(logits, sampling, rows, positions)
    for kept in ([0, 1], [4, 2], [3], [2, 3, 4, 0, 1]):
        got = draw(logits[kept], sampling, kept, [positions[row] for row in kept])
        assert got == [together[row] for row in kept]
    others = torch.cat((logits[2:3], torch.zeros(2, 40)))  # whatever they hold
    assert draw(others, sampling, [2, 1, 0], [7, 7, 7])[0] == together[2]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1, "top_p": 0.1}],
    ids=str,
)
def test_nan_is_refused(options):
    logits = torch.zeros(3, 5)
    logits[:, 2] = 4.0
    assert draw(logits, Sampling(top_k=1), [0, 1, 2], [0, 0, 0]) == [2, 2, 2]
    logits[1, 4] = NAN
    with pytest.raises(FloatingPointError, match="^generate: logits must be numbers, got NaN$"):
        draw(logits, Sampling(**options), [0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_infinite_logits(options):
    """+inf is the one token to draw, -inf is none."""
    logits = torch.tensor([[0.0, INF, 1.0, 2.0], [-INF, -INF, 0.0, -INF]])
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, **options)
        assert draw(logits, sampling, [0, 1], [0, 0]) == [1, 2]


def test_bfloat16_logits():
    logits = torch.tensor([LOGITS]).bfloat16()
    got = probabilities(logits, temperature=1.0)
    torch.testing.assert_close(got[0].tolist(), naive(logits[0].tolist()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-8, 1e-39, 1e-308])
def test_a_tiny_temperature_is_greedy(temperature):
    """Logits over it overflow; a token outside the vocabulary must not come of that."""
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    assert draw(logits, Sampling(temperature=temperature), [0, 1], [0, 0]) == [2, 0]
    nucleus = Sampling(temperature=temperature, top_p=0.9)
    assert draw(logits, nucleus, [0, 1], [0, 0]) == [2, 0]
    assert (kept_logits(logits, nucleus) > -INF).sum(-1).tolist() == [1, 1]


def test_a_large_temperature_draws_any_token():
    sampling = Sampling(temperature=1e60)
    drawn = draw(torch.tensor(LOGITS).repeat(200, 1), sampling, [0] * 200, range(200))
    assert set(drawn) == {0, 1, 2, 3, 4, 5, 7}


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
