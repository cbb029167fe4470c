"""Sampling in exit_decision: the noise to the bit, the draws against the exact softmax."""

import pytest
import torch
from torch import Tensor

from lego.ops.gumbel import gumbel, philox
from lego_kernels.ops.exit_decision import exit_decision, exit_decision_workspace
from tests.exit_decision_cases import check, inputs, logits_of
from tests.oracle import assert_same_bits

OP = "exit_decision"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def test_philox_known_answers():
    # of the Random123 distribution, philox4x32 with 10 rounds
    zero, ones = torch.zeros(1).long(), torch.full((1,), 0xFFFFFFFF)
    words = [int(word) for word in philox((zero,) * 4, (zero,) * 2)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(word) for word in philox((ones,) * 4, (ones,) * 2)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_gumbel_noise():
    seed, offset = torch.tensor([1, 1, -5, 2**62]), torch.tensor([0, 1, 0, -1])
    noise = gumbel(seed, offset, 200_001)
    assert noise.dtype == torch.float64 and noise.isfinite().all()
    assert torch.equal(gumbel(seed[2:3], offset[2:3], 77), noise[2:3, :77])  # by token, not width
    # mean: Euler's constant; variance: pi^2 / 6; four standard errors
    torch.testing.assert_close(
        noise.mean(1), torch.full((4,), 0.5772157).double(), atol=0.0115, rtol=0
    )
    torch.testing.assert_close(
        noise.var(1), torch.full((4,), 1.644934).double(), atol=0.035, rtol=0
    )
    assert abs(torch.corrcoef(noise).fill_diagonal_(0)).max() < 4 / 200_000**0.5


NOISE = [
    {"temperature": 0.7, "seed": 0, "offset": 0},
    {"temperature": 3.0, "seed": 2**63 - 1, "offset": 2**40 + 3},
    {"temperature": 1e-3, "seed": -1, "offset": -(2**63)},
]


@DTYPES
@pytest.mark.parametrize("noise", NOISE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 300), (4, 24, 1003)], ids=str)
def test_draws_what_the_reference_draws(shape, noise, dtype, device):
    got = check(*inputs(shape, dtype, device), "max_prob", **noise)
    greedy = exit_decision(*inputs(shape, dtype, device), threshold=0.3)
    assert_same_bits(got.confidence, greedy.confidence)  # whatever is drawn
    assert_same_bits(got.lse, greedy.lse)


def test_noise_belongs_to_seed_and_offset(device, provider):
    B = 16 if provider == "triton" else 64  # the interpreter takes 40 s for 64
    h, head = inputs((1, 16, 500), torch.float32, device)
    h = h.expand(B, 16).contiguous()
    given = {"threshold": 0.3, "temperature": 1.5}
    index = torch.arange(B, device=device)
    by_offset = exit_decision(h, head, seed=3, offset=index, **given).token
    assert len(set(by_offset.tolist())) > B // 2
    turned = exit_decision(h, head, seed=3, offset=index.flip(0), **given).token
    assert torch.equal(turned.flip(0), by_offset)
    by_seed = exit_decision(h, head, seed=index + 2**32, offset=3, **given).token
    assert len(set(by_seed.tolist())) > B // 2 and not torch.equal(by_seed, by_offset)
    check(h, head, "max_prob", temperature=1.5, seed=index * 2**32, offset=index - 9)
    temperature = torch.linspace(0, 2, B, device=device)
    mixed = exit_decision(h, head, threshold=0.3, temperature=temperature, seed=3, offset=index)
    assert mixed.token[0] == exit_decision(h[:1], head, threshold=0.3).token  # temperature 0
    check(h, head, "max_prob", temperature=temperature, seed=3, offset=index)


# offset and token, under seed 0, of the words below 40, which win, and of those above 2^32 - 40
FAR_OUT = [(2092806, 190), (3441155, 58), (3540204, 117), (2280615, 283), (3474781, 4)]
FAR_OUT += [(147185, 155), (2114172, 271), (1511205, 108), (1213282, 163), (1260597, 24)]


def test_noise_of_every_token(device, provider):
    """Two tokens are left of each row, their logits a hair to either side of a tie under noise."""
    V, many = 300, 10 if provider == "triton" else 1000
    offset, token = torch.tensor(FAR_OUT + [(row, row * 7 % V) for row in range(many)]).T
    rows, other = torch.arange(len(token)), (token + 1 + offset % (V - 1)) % V
    noise = gumbel(torch.zeros_like(offset), offset, V)
    first, second = noise[rows, token], noise[rows, other]
    # float32 of noise, of two sums; and u, which as a float32 is coarse near 1, where noise is low
    exponential = torch.exp(-torch.stack((first, second)))
    coarse = 2.0**-24 * exponential.expm1() / exponential
    hair = 2.0**-20 * (1 + first.abs() + second.abs()) + coarse.sum(0).clamp(max=1)
    given = {"threshold": 0.5, "temperature": 1.0, "seed": 0, "offset": offset.to(device)}
    for side, expected in ((-1, other), (1, token)):
        h = torch.full((len(token), V), -1e4)
        h[rows, other] = 0.0
        h[rows, token] = (second - first + side * hair).float()
        got = exit_decision(h.to(device), torch.eye(V, device=device), **given)
        assert torch.equal(got.token.cpu(), expected)


def chi_squared(counts: Tensor, prob: Tensor) -> float:
    """The survival probability of Pearson's statistic; bins expect 8 draws at least."""
    from scipy import stats

    order = prob.argsort(descending=True)
    expected = prob[order] * counts.sum()
    share = expected.sum().item() / 200
    bin_of = (expected.cumsum(0) / max(8.0, share)).long().unique(return_inverse=True)[1]
    num_bins = int(bin_of.max()) + 1
    seen = torch.zeros(num_bins).double().index_add(0, bin_of, counts[order].double())
    wanted = torch.zeros(num_bins).double().index_add(0, bin_of, expected)
    enough = wanted >= 8  # the last bins may hold less: they count as one
    seen = torch.cat((seen[enough], seen[~enough].sum()[None]))
    wanted = torch.cat((wanted[enough], wanted[~enough].sum()[None]))
    if wanted[-1] == 0:
        seen, wanted = seen[:-1], wanted[:-1]
    return float(stats.chisquare(seen.numpy(), wanted.numpy()).pvalue)


@pytest.mark.parametrize(("V", "num_draws"), [(100, 20_000), (32_000, 2_000)])
def test_draws_follow_the_softmax(V, num_draws, device, provider):
    if provider == "triton":
        pytest.skip("thousands of interpreted programs; it draws what the reference draws")
    if provider in ("torch", "scalar"):
        num_draws //= 10  # int64 arithmetic, four lanes
    h, head = inputs((1, 8, V), torch.float32, device)
    prob = (logits_of(h.double(), head.double())[0] / 1.3).softmax(0).cpu()
    counts = torch.zeros(V, dtype=torch.int64)
    rows = min(num_draws, 500)
    workspace = exit_decision_workspace(h.expand(rows, 8), head)
    for first in range(0, num_draws, rows):
        offset = torch.arange(first, first + rows, device=device)
        noise = {"temperature": 1.3, "seed": 11, "offset": offset}
        every = h.expand(rows, 8)
        token = exit_decision(every, head, threshold=0.3, workspace=workspace, **noise).token
        counts += token.cpu().bincount(minlength=V)
    assert chi_squared(counts, prob) > 1e-4
