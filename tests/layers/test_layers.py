"""The drop-in layers against the stock ones: same parameters, same results, inference only."""

import copy

import pytest
import torch
from torch import nn

import lego.layers
from lego.config import ModelConfig
from lego.kv_cache import KVCache as StockCache
from lego.kv_cache import attend_within
from lego_kernels import exit_decision
from lego_kernels.layers import MLP, Attention, ExitHead, KVCache, Linear, RMSNorm
from tests.oracle import DEVICES, assert_error_bounded, random

D, HQ, HKV, E, F = 24, 6, 2, 8, 20
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
ON = pytest.mark.parametrize("device", DEVICES)


def config(**changes) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        dim=HQ * E,
        num_layers=2,
        exit_layer=1,
        num_heads=HQ,
        num_kv_heads=HKV,
        hidden_dim=F,
        max_seq_len=32,
        **changes,
    )


def randomised(layer: nn.Module) -> nn.Module:
    for seed, (_, parameter) in enumerate(layer.named_parameters()):
        values = random(tuple(parameter.shape), torch.float32, "cpu", seed=seed)
        values = 1 + 0.3 * values if parameter.dim() == 1 else values * parameter.size(-1) ** -0.5
        parameter.data.copy_(values)
        parameter.requires_grad_(False)
    return layer.eval()


def stock_layers() -> dict[str, tuple[nn.Module, type, int]]:
    """Stock layer, its drop-in, and the width of what it takes."""
    affine = nn.RMSNorm(D, eps=1e-3)
    return {
        "RMSNorm": (lego.layers.RMSNorm(D, 1e-5), RMSNorm, D),
        "torch.nn.RMSNorm": (affine, RMSNorm, D),
        "torch.nn.RMSNorm, default eps": (nn.RMSNorm(D), RMSNorm, D),
        "Linear": (nn.Linear(D, F, bias=False), Linear, D),
        "Linear with bias": (nn.Linear(D, F), Linear, D),
        "MLP": (lego.layers.MLP(config()), MLP, HQ * E),
    }


@ON
@DTYPES
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (2, 9)], ids=str)
@pytest.mark.parametrize("name", stock_layers())
def test_gives_what_the_stock_layer_gives(name, shape, dtype, device):
    stock, drop_in, width = stock_layers()[name]
    stock = randomised(stock).to(device, dtype)
    x = random((*shape, width), dtype, device, seed=9)
    got = drop_in.from_stock(stock)(x)
    wide = copy.deepcopy(stock).double()
    if getattr(stock, "eps", 0) is None:
        wide.eps = torch.finfo(torch.float32).eps  # torch's default is that of what it computes in
    exact = wide(x.double())
    assert got.dtype == dtype
    assert_error_bounded(got, stock(x), exact, floor=2e-6)


def attention(**changes) -> lego.layers.Attention:
    own_kv = changes.pop("own_kv", True)
    return randomised(lego.layers.Attention(config(**changes), own_kv=own_kv))


ATTENTION = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": True, "qk_norm": True},
        {"own_kv": False, "qk_norm": True},
    ],
    ids=str,
)


def angles(num_rows: int, num_tokens: int, start: int, device: str):
    rotary = lego.layers.Rotary(config()).to(device)
    first = start + torch.arange(num_rows, device=device)[:, None]
    return rotary(first + torch.arange(num_tokens, device=device))


@ON
@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
@ATTENTION
def test_attention_over_a_cache(changes, num_tokens, dtype, device):
    stock = attention(**changes).to(device, dtype)
    x = random((3, num_tokens, HQ * E), dtype, device, seed=9)
    slot = torch.tensor([0, 5, 2], device=device)
    shape = (1, 3, 30, HKV, E)
    k, v = random((2, *shape), dtype, device, seed=10)
    caches = KVCache(k.clone(), v.clone()), StockCache(k.clone(), v.clone())
    exact_cache = StockCache(k.double(), v.double())
    turned = angles(3, num_tokens, 4, device)
    got = Attention.from_stock(stock)(x, turned, caches[0].attend(0, slot))
    eager = stock(x, turned, caches[1].attend(0, slot))
    exact = copy.deepcopy(stock).double()(x.double(), turned, exact_cache.attend(0, slot))
    assert_error_bounded(got, eager, exact, floor=2e-6)
    for name in ("k", "v"):
        mine, eagers, exacts = (getattr(c, name) for c in (*caches, exact_cache))
        assert_error_bounded(mine, eagers, exacts, floor=2e-6)


@ON
@ATTENTION
def test_attention_within_a_sequence(changes, device):
    stock = attention(**changes).to(device)
    x = random((2, 7, HQ * E), torch.float32, device, seed=9)
    every_row = angles(1, 7, 0, device)  # [1, T, E / 2]: positions that all rows share
    given = random((2, 2, 7, HKV, E), torch.float32, device, seed=3)

    def attend(q, kv):
        return attend_within(q, tuple(given) if kv is None else kv)

    got = Attention.from_stock(stock)(x, every_row, attend)
    torch.testing.assert_close(got, stock(x, every_row, attend), atol=2e-6, rtol=2e-6)
    if stock.own_kv:
        for mine, theirs in zip(
            Attention.from_stock(stock).project_kv(x, every_row),
            stock.project_kv(x, every_row),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)


@ON
@DTYPES
def test_exit_head(dtype, device):
    norm = randomised(lego.layers.RMSNorm(D, 1e-5)).to(device, dtype)
    head = randomised(nn.Linear(D, 301, bias=False)).to(device, dtype)
    layer = ExitHead.from_stock(norm, head)
    for num_rows in (2, 5, 1):  # the scratch memory grows, and is enough for less
        h = random((num_rows, D), dtype, device, seed=num_rows)
        got = layer(h, threshold=0.1, criterion="margin")
        args = {"threshold": 0.1, "criterion": "margin", "norm_weight": norm.weight, "eps": 1e-5}
        for mine, expected in zip(got, exit_decision(h, head.weight, **args), strict=True):
            assert torch.equal(mine, expected)
    with pytest.raises(ValueError, match="^ExitHead: head must have no bias, got one$"):
        ExitHead.from_stock(norm, nn.Linear(D, 301))


def drop_ins() -> list[nn.Module]:
    layers = [drop_in.from_stock(stock.eval()) for stock, drop_in, _ in stock_layers().values()]
    exit_head = ExitHead.from_stock(lego.layers.RMSNorm(D, 1e-5), nn.Linear(D, 30, bias=False))
    return [*layers, Attention.from_stock(attention(qk_norm=True)), exit_head.eval()]


@pytest.mark.parametrize("name", [*stock_layers(), "Attention"])
def test_state_dicts_go_both_ways(name):
    stock, drop_in, _ = stock_layers().get(name) or (attention(qk_norm=True), Attention, 0)
    layer = drop_in.from_stock(stock)
    assert list(layer.state_dict()) == list(stock.state_dict())
    for mine, theirs in zip(layer.parameters(), stock.parameters(), strict=True):
        assert mine is theirs  # shared, not copied
    other = randomised(copy.deepcopy(stock))
    layer.load_state_dict(other.state_dict())
    for key, value in stock.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    other.load_state_dict(layer.state_dict())


def fresh_layers() -> list[nn.Module]:
    """As a user makes them, from sizes alone."""
    heads = {"num_heads": HQ, "num_kv_heads": HKV, "head_dim": E}
    return [
        RMSNorm(D, 1e-5),
        Linear(D, F),
        MLP(D, F),
        Attention(D, **heads, qk_norm=True, bias=True),
        ExitHead(D, 50),
    ]


def call(layer: nn.Module, x: torch.Tensor) -> object:
    if isinstance(layer, Attention):
        cache = KVCache.allocate(1, x.size(0), 8, HKV, E, like=x)
        slot = torch.zeros(x.size(0), dtype=torch.int64)
        x = x[:, None]
        return layer(x, angles(x.size(0), 1, 0, "cpu"), cache.attend(0, slot))
    return layer(x, threshold=0.5) if isinstance(layer, ExitHead) else layer(x)


@pytest.mark.parametrize("layer", fresh_layers(), ids=lambda layer: type(layer).__name__)
def test_refuses_to_train(layer):
    name, x = type(layer).__name__, torch.ones(2, D)
    with pytest.raises(RuntimeError, match=f"^{name}: is inference only, so call eval"):
        call(layer, x)  # modules start in training mode
    with pytest.raises(RuntimeError, match="is inference only, so no input may require grad"):
        call(layer.eval(), x)
    with torch.no_grad():
        call(layer, x)
    with pytest.raises(RuntimeError, match="is inference only, so no input may require grad"):
        call(layer.requires_grad_(False), x.requires_grad_())


def test_a_linear_layer_of_many_rows_refuses_grad():
    with pytest.raises(RuntimeError, match="^Linear: is inference only"):
        Linear(D, F).eval()(torch.ones(50, D))


def test_rms_norm_adds_the_residual():
    norm = RMSNorm(D, 1e-5).eval().requires_grad_(False)
    x, residual = random((2, 3, D), torch.float32, "cpu"), random((2, 3, D), torch.float32, "cpu")
    expected = norm(x + residual)
    before = x + residual
    assert torch.equal(norm(x, residual), expected) and torch.equal(residual, before)
    with pytest.raises(ValueError, match="^RMSNorm: weight must be a parameter"):
        RMSNorm.from_stock(nn.RMSNorm(D, elementwise_affine=False))
