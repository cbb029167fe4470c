"""decode_layers: the bits of the ops that it is made of, and the model that they make up."""

import pytest
import torch

from lego.engine import decoder_weights
from lego_kernels import library
from lego_kernels.decoder.decode_layers import decode_layers
from lego_kernels.decoder.state import layer_table, workspace_width
from tests.decode_layers_cases import SHAPES, Case, Shape, chunk
from tests.models import VARIANTS, tiny_model, token_ids
from tests.oracle import FLOORS, assert_error_bounded, assert_same_bits

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
ANY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
# rows 0 to 2; the middle one brings several tokens, which see each other
CHUNKS = {
    "one token": chunk((0, 3)),
    "first slot": chunk((0, 0)),
    "ragged rows": chunk((2, 39), (0, 1), (1, 17)),
    "tokens of one row": chunk((1, 4), (1, 5), (1, 6), (1, 7), (1, 8)),
    "sixteen": chunk(*((n % 3, 2 + n // 3) for n in range(16))),
    "newest first": chunk((1, 9), (0, 3), (1, 7), (1, 8)),
}


@pytest.fixture(params=library.CPU_ISAS, autouse=True)
def isa(request):
    if request.param not in library.cpu_isas():
        pytest.skip(f"{request.param}: this CPU lacks it")
    with library.use_cpu_isa(request.param):
        yield request.param


def assert_same_writes(got, expected):
    for one, other in zip(got.written(), expected.written(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("tokens", CHUNKS.values(), ids=CHUNKS)
@ANY_SHAPE
@DTYPES
def test_bits_are_those_of_the_ops(dtype, shape, tokens):
    got, expected = Case(shape, dtype), Case(shape, dtype)
    untouched = [x.clone() for x in got.written()]
    assert_same_bits(got.run(tokens), expected.composed(tokens))
    assert_same_writes(got, expected)
    for now, before in zip(got.written()[: 2 * shape.own_kv], untouched, strict=False):
        changed = (now != before).flatten(3).any(-1)
        assert changed.any(0).sum() <= len(tokens)  # in the slots of the chunk and in no other


def test_without_states(isa):
    got, expected = (Case(SHAPES["gqa"], torch.float32) for _ in range(2))
    got.states = expected.states = None
    assert_same_bits(got.run(CHUNKS["sixteen"]), expected.composed(CHUNKS["sixteen"]))
    assert_same_writes(got, expected)


@ANY_SHAPE
@DTYPES
def test_a_row_depends_neither_on_the_others_nor_on_the_chunks(dtype, shape):
    """48 tokens of 3 rows, in chunks of 1, 3, 16 and 40, and row 0 alone."""
    tokens = chunk(*((n % 3, n // 3 + 2 * (n % 3)) for n in range(48)))
    whole = Case(shape, dtype)
    h = whole.run(tokens)
    assert not h.isnan().any()
    for size in (1, 3, 16, 40):
        parts = Case(shape, dtype)
        assert_same_bits(torch.cat([parts.run(part) for part in tokens.split(size)]), h)
        assert_same_writes(parts, whole)
    alone, mine = Case(shape, dtype), tokens[:, 1] == 0
    assert_same_bits(torch.cat([alone.run(part) for part in tokens[mine].split(5)]), h[mine])
    for one, other in zip(alone.written()[:2], whole.written()[:2], strict=True):
        assert_same_bits(one[:, 0], other[:, 0])


def test_slots_after_the_token_are_never_read():
    """They hold what was rolled back."""
    clean, dirty = (Case(SHAPES["gqa"], torch.float32) for _ in range(2))
    tokens = CHUNKS["tokens of one row"]
    for cache in (dirty.k_cache, dirty.v_cache):
        cache[:, 1, 9:] = torch.nan
    assert_same_bits(dirty.run(tokens), clean.run(tokens))


def native_states(model, ids, chunk_size):
    """Exit and final states [T, D] of one text, in row 1 of two."""
    weights, T = decoder_weights(model), len(ids)
    new = weights.embedding.new_zeros
    states, h, shape = new(2, T, weights.dim), new(T, weights.dim), (2, T, weights.num_kv_heads)
    workspace = new(T * workspace_width(weights))

    def run(layers, source, sources, states, caches, num_heads, own_kv):
        table = layer_table(layers)
        for tokens in torch.stack(
            (sources, torch.ones_like(ids), torch.arange(T), torch.arange(T)), dim=1
        ).split(chunk_size):
            at = slice(int(tokens[0, 2]), int(tokens[-1, 2]) + 1)
            shared = (weights.cos, weights.sin, num_heads, own_kv, weights.hidden_dim, weights.eps)
            decode_layers(table, tokens, source, h[at], states, *caches, *shared, workspace)

    caches = [new(len(weights.lower), *shape, weights.head_dim) for _ in "kv"]
    run(map(vars, weights.lower), weights.embedding, ids, states, caches, weights.num_heads, True)
    caches = [new(len(weights.upper), *shape, weights.head_dim) for _ in "kv"]
    exit_states, sources = states.view(2 * T, -1), T + torch.arange(T)
    own_kv = weights.upper_kv is None
    if not own_kv:
        names = ("attention_norm", "in_proj", "in_bias", "k_norm")
        projections = [dict(zip(names, x, strict=True)) for x in weights.upper_kv_layers()]
        run(projections, exit_states, sources, None, caches, 0, True)
    upper = [vars(layer) for layer in weights.upper]
    run(upper, exit_states, sources, None, caches, weights.num_heads, own_kv)
    return states[1], h


@pytest.mark.parametrize("variant", VARIANTS)
@BOTH
@DTYPES
def test_error_against_the_model(dtype, upper_kv, variant):
    """Every switch of a model, biases too, over whole texts."""
    model = tiny_model(upper_kv, dtype=dtype, **VARIANTS[variant])
    exact_model, ids = tiny_model(upper_kv, **VARIANTS[variant]), token_ids(23)
    exact_model.load_state_dict(model.state_dict())
    got = native_states(model, ids, 8)
    for state, eager, exact in zip(got, model(ids[None]), exact_model(ids[None]), strict=True):
        floor = FLOORS[dtype] * float(exact.abs().max())
        assert_error_bounded(state, eager[0], exact[0], floor=floor)


@DTYPES
def test_bias_is_added_to_what_the_op_without_one_gives(dtype):
    case, biased = (Case(SHAPES["keys and values alone"], dtype) for _ in range(2))
    tokens, width = CHUNKS["ragged rows"], 2 * 2 * 10
    bias = torch.linspace(-2, 2, width).to(dtype)
    biased.table[:, 2] = bias.data_ptr()
    case.run(tokens)
    biased.run(tokens)
    _, rows, _, slots = tokens.unbind(1)
    plain, shifted = (x.v_cache[:, rows, slots].flatten(2).double() for x in (case, biased))
    expected = plain + bias[width // 2 :].double()
    floor = 2 * FLOORS[dtype] * float(expected.abs().max())
    assert_error_bounded(shifted, expected, expected, floor=floor)


LIMITS = {"source": 30, "row": 3, "position": 40, "slot": 40}


@pytest.mark.parametrize("value", ["negative", "past the end", "far"])
@pytest.mark.parametrize(("column", "name"), list(enumerate(LIMITS)))
def test_a_bad_token_is_refused_before_anything_is_written(column, name, value):
    case, tokens = Case(SHAPES["gqa"], torch.float32), CHUNKS["ragged rows"].clone()
    got = {"negative": -1, "past the end": LIMITS[name], "far": 2**62}[value]
    tokens[2, column] = got
    before, h = [x.clone() for x in case.written()], torch.full((3, 48), 5.0)
    sentence = rf"^decode_layers: {name} must be in \[0, {LIMITS[name]}\), got {got} in token 2$"
    with pytest.raises(ValueError, match=sentence):
        case.run(tokens, h=h)
    assert torch.all(h == 5)
    for now, then in zip(case.written(), before, strict=True):
        assert_same_bits(now, then)


def test_the_tables_bound_positions_where_there_are_no_states():
    case, tokens = Case(SHAPES["gqa"], torch.float32), chunk((0, 3))
    case.states = None
    tokens[0, 2] = 49
    case.run(tokens)
    tokens[0, 2] = 50
    with pytest.raises(ValueError, match=r"position must be in \[0, 50\), got 50 in token 0$"):
        case.run(tokens)
    case = Case(Shape(P=7), torch.float32)
    tokens[0, 2] = 7
    with pytest.raises(ValueError, match=r"position must be in \[0, 7\), got 7 in token 0$"):
        case.run(tokens)


@ANY_SHAPE
def test_no_tokens(shape):
    case = Case(shape, torch.float32)
    before = [x.clone() for x in case.written()]
    assert case.run(chunk()).shape == (0, shape.D)
    for now, then in zip(case.written(), before, strict=True):
        assert_same_bits(now, then)


def test_other_dtypes_are_refused():
    case = Case(SHAPES["gqa"], torch.float64)
    with pytest.raises((ValueError, RuntimeError), match="decode_layers"):
        case.run(chunk((0, 3)))


def test_schema_and_fake():
    case, tokens = Case(SHAPES["gqa"], torch.float32), chunk((0, 3), (1, 2))
    h, workspace = torch.empty(2, 48), torch.empty(2 * 300)
    arguments = (case.table, tokens, case.source, h, case.states, case.k_cache, case.v_cache)
    rest = (case.cos, case.sin, 4, True, 37, 1e-5, workspace)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_layers, (*arguments, *rest), test_utils=checks)
