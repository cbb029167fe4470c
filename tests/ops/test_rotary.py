"""rotary against complex multiplication in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.rotary import rotary, rotary_tables
from tests.oracle import DEVICES, random

ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def naive(x, position, theta):
    """Component a of the first half and a of the second are one complex number, turned."""
    B, T, H, E = x.shape
    x = x.double()
    out = torch.empty_like(x)
    for b in range(B):
        for t in range(T):
            for a in range(E // 2):
                angle = int(position[b % position.size(0), t]) * theta ** (-2 * a / E)
                turn = complex(math.cos(angle), math.sin(angle))
                for h in range(H):
                    turned = complex(x[b, t, h, a], x[b, t, h, a + E // 2]) * turn
                    out[b, t, h, a], out[b, t, h, a + E // 2] = turned.real, turned.imag
    return out


def test_tables():
    cos, sin = rotary_tables(6, 20_000, 500.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (20_000, 3)
    # float32 angles would be off by 1e-3 here
    for position in (0, 1, 10_007, 19_999):
        for a in range(3):
            angle = position * 500.0 ** (-2 * a / 6)
            assert abs(cos[position, a].item() - math.cos(angle)) < 1e-7
            assert abs(sin[position, a].item() - math.sin(angle)) < 1e-7


def scaled_frequency(frequency, factor, low, high, length):
    """llama3 by wavelengths, as it was published."""
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    kept = (length / wavelength - low) / (high - low)
    return (1 - kept) * frequency / factor + kept * frequency


@pytest.mark.parametrize("numbers", [(8, 1, 4, 8192), (32, 1, 4, 8192), (3, 0.5, 7, 100)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_tables(numbers, head_dim):
    factor, low, high, length = numbers
    cos, sin = rotary_tables(
        head_dim, 10_008, 5e5, factor=factor, band=(low / length, high / length)
    )
    kinds = set()
    for a in range(head_dim // 2):
        plain = 5e5 ** (-2 * a / head_dim)
        frequency = scaled_frequency(plain, *numbers)
        kinds.add((frequency == plain, frequency == plain / factor))
        for position in (0, 1, 999, 10_007):
            assert abs(cos[position, a].item() - math.cos(position * frequency)) < 1e-7
            assert abs(sin[position, a].item() - math.sin(position * frequency)) < 1e-7
    assert kinds == {(True, False), (False, True), (False, False)}


def test_linear_tables_are_those_of_slower_positions():
    slow, plain = rotary_tables(6, 64, 500.0, factor=4.0), rotary_tables(6, 16, 500.0)
    for one, other in zip(slow, plain, strict=True):
        torch.testing.assert_close(one[::4], other, rtol=0, atol=1e-7)
    assert not torch.equal(slow[0][:16], plain[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 2, 10), (3, 5, 4, 16)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own positions", "shared positions"])
def test_matches_formula(shape, dtype, device, shared):
    x = random(shape, dtype, device)
    generator = torch.Generator().manual_seed(2)
    num_rows = 1 if shared else shape[0]
    position = torch.randint(90, (num_rows, shape[1]), generator=generator)
    angles = (table[position].to(device) for table in rotary_tables(shape[-1], 90, 100.0))
    got = rotary(x, *angles)
    assert got.dtype == dtype and got.shape == x.shape
    # the tables are float32 whatever the dtype of x
    bound = max(ERROR[dtype], 2e-7) * 4
    assert (got.cpu().double() - naive(x.cpu(), position, 100.0)).abs().max() <= bound


def test_float64_in_is_float64_out():
    x, (cos, sin) = random((1, 1, 1, 4), torch.float64, "cpu"), rotary_tables(4, 8, 10.0)
    got = rotary(x, cos[None, 7:], sin[None, 7:])[0, 0, 0]
    first, second = x[0, 0, 0].chunk(2)
    c, s = cos[7].double(), sin[7].double()
    exact = torch.cat((first * c - second * s, first * s + second * c))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-15)


def test_edges():
    cos, sin = rotary_tables(4, 3, 10.0)
    x = random((2, 3, 2, 4), torch.float32, "cpu")
    assert torch.equal(rotary(x, cos[:1].expand(2, 3, 2), sin[:1].expand(2, 3, 2)), x)
    assert rotary(x[:0], cos[None], sin[None]).shape == (0, 3, 2, 4)
    assert rotary(x[:, :0], cos[None, :0], sin[None, :0]).shape == (2, 0, 2, 4)


@pytest.mark.parametrize(("head_dim", "theta"), [(3, 10.0), (4, 0.0), (4, -1.0)])
def test_refuses(head_dim, theta):
    with pytest.raises(ValueError) as caught:
        rotary_tables(head_dim, 8, theta)
    sentence = f"head_dim must be even and theta positive, got {head_dim}, {theta}"
    assert str(caught.value) == f"rotary_tables: {sentence}"


@pytest.mark.parametrize(
    ("factor", "band"),
    [(0.5, None), (math.nan, None), (2.0, (0.0, 1.0)), (2.0, (1.0, 1.0)), (2.0, (2.0, 1.0))],
)
def test_refuses_scalings(factor, band):
    with pytest.raises(ValueError) as caught:
        rotary_tables(4, 8, 10.0, factor=factor, band=band)
    sentence = f"factor must be >= 1 and band rise from above 0, got {factor}, {band}"
    assert str(caught.value) == f"rotary_tables: {sentence}"


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_refuses_heads_of_another_width(width):
    cos, sin = rotary_tables(4, 3, 10.0)
    with pytest.raises(ValueError) as caught:
        rotary(torch.ones(1, 3, 2, width), cos[None], sin[None])
    sentence = f"rotary: x must have heads of width 4, got (1, 3, 2, {width})"
    assert str(caught.value) == sentence


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 400), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_scores_depend_on_the_distance_alone(shift, first, second, seed):
    q, k = random((2, 1, 1, 1, 8), torch.float64, "cpu", seed=seed)
    cos, sin = rotary_tables(8, 500, 100.0)

    def at(x, position):
        return rotary(x, cos[None, position, None], sin[None, position, None])

    def score(i, j):
        return (at(q, i) * at(k, j)).sum()

    torch.testing.assert_close(
        score(first, second), score(first + shift, second + shift), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(at(q, first).norm(), q.norm(), rtol=1e-6, atol=0)
