"""The native engine: the reference's tokens, exits, confidences and calls."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.engine import NativeEngine
from lego.generation import generate
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative
from lego_kernels import library
from tests.engine_checks import (
    assert_right,
    assert_same,
    assert_same_counts,
    by_both,
    exact_rows,
    in_float64,
)
from tests.models import (
    CRITERIA,
    POLICIES,
    VARIANTS,
    agreeing_model,
    early_exit,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
KINDS = ("exit_state", "own")
BOTH = pytest.mark.parametrize("upper_kv", KINDS)
# (upper_kv, how, criterion) for every strategy that the engine serves
WAYS = [
    *((kind, "full", "max_prob") for kind in KINDS),
    *((kind, policy, criterion) for policy, kind in POLICIES.items() for criterion in CRITERIA),
    *((kind, "speculative", criterion) for kind in KINDS for criterion in CRITERIA),
]
ANY_WAY = pytest.mark.parametrize("way", WAYS, ids=" ".join)
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8, seed=3),
    "top-k": Sampling(temperature=1.3, top_k=9, seed=2**63 - 1),
    "top-p": Sampling(temperature=1.1, top_k=30, top_p=0.7, seed=11),
}
PROMPTS = [token_ids(n, seed=n).tolist() for n in (1, 7, 3, 12)]
MANY = [token_ids(1 + n % 11, seed=n).tolist() for n in range(16)]


def model_and_strategy(way, *, dtype=torch.float32, **changes):
    """A model in which about half of the tokens exit, or half of the drafts are right."""
    upper_kv, how, criterion = way
    if how != "speculative":
        model = tiny_model(upper_kv, dtype=dtype, **changes)
        exact = in_float64(model)
        return model, FullDepth() if how == "full" else early_exit(exact, how, criterion)
    model = agreeing_model(upper_kv, share=0.2, dtype=dtype, **changes)
    policy = "exact" if upper_kv == "exit_state" else "recompute"
    stop = early_exit(in_float64(model), policy, criterion, share=0.7).threshold
    return model, Speculative(draft_tokens=3, stop_confidence=stop, criterion=criterion)


# two variants a way, by turns
TURNS = [(way, list(VARIANTS)[(i + 3 * k) % 6]) for i, way in enumerate(WAYS) for k in range(2)]


@pytest.mark.parametrize(("way", "variant"), TURNS, ids=lambda x: str(x))
def test_is_the_reference(way, variant):
    model, strategy = model_and_strategy(way, **VARIANTS[variant])
    got, expected = by_both(model, PROMPTS, 6, strategy)
    assert_same(got, expected)
    if isinstance(strategy, EarlyExit):
        assert len({layer for row in got.exit_layer for layer in row}) == 2


@ANY_WAY
def test_every_count_of_one_row(way):
    """Passes and slots too: alone, a row shares no weight with others in either engine."""
    model, strategy = model_and_strategy(way)
    got, expected = by_both(model, PROMPTS[3:], 12, strategy)
    assert_same(got, expected)
    assert_same_counts(got, expected)


@ANY_WAY
def test_rows_that_stop_apart(way):
    model, strategy = model_and_strategy(way)
    prompts = MANY[:10]
    free = generate(model, prompts, 8, strategy, engine=NativeEngine(model))
    stop = [free.tokens[0][2], free.tokens[5][6]]
    by_engine = [], []
    outputs = [
        generate(model, prompts, 8, strategy, engine=e, stop_tokens=stop, streamer=streamed.append)
        for e, streamed in zip((NativeEngine(model), None), by_engine, strict=True)
    ]
    assert_same(*outputs)
    native, reference = ([(x.row, x.token, x.exit_layer) for x in rows] for rows in by_engine)
    assert native == reference
    assert len(set(map(len, outputs[0].tokens))) >= 3
    for row, kept in zip(free.tokens, outputs[0].tokens, strict=True):
        assert row[: len(kept)] == kept


@pytest.mark.parametrize("sampling", list(SAMPLINGS)[1:])
@pytest.mark.parametrize("way", [way for way in WAYS if way[2] == "max_prob"], ids=" ".join)
def test_draws_are_those_of_the_reference(way, sampling):
    model, strategy = model_and_strategy(way)
    got, expected = by_both(model, PROMPTS, 6, strategy, sampling=SAMPLINGS[sampling])
    assert_same(got, expected)
    greedy = generate(model, PROMPTS, 6, strategy, engine=NativeEngine(model))
    assert greedy.tokens != got.tokens


@pytest.mark.parametrize(("turn", "way"), list(enumerate(WAYS)), ids=str)
def test_16_bit_tokens_are_right_up_to_rounding(turn, way):
    """Every way greedy in one dtype and sampled in the other, by turns."""
    dtypes = [torch.bfloat16, torch.float16][:: 1 if turn % 2 else -1]
    for dtype, name in zip(dtypes, ("greedy", "temperature"), strict=True):
        model, strategy = model_and_strategy(way, dtype=dtype)
        options = {"engine": NativeEngine(model), "sampling": SAMPLINGS[name]}
        output = generate(model, PROMPTS[:2], 5, strategy, **options)
        assert assert_right(model, PROMPTS[:2], output, strategy, SAMPLINGS[name]) > 0.75


@st.composite
def models(draw):
    """Any small model: no size is a multiple of anything, but for what ModelConfig asks."""
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_layers = draw(st.integers(2, 4))
    changes = {
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "dim": num_kv_heads * group * 2 * draw(st.integers(1, 7)),
        "hidden_dim": draw(st.integers(1, 40)),
        "vocab_size": draw(st.integers(1, 70)),
        "num_layers": num_layers,
        "exit_layer": draw(st.integers(1, num_layers - 1)),
        "qk_norm": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return tiny_model(
        draw(st.sampled_from(KINDS)), dtype=dtype, seed=draw(st.integers(0, 9)), **changes
    )


@st.composite
def strategies(draw):
    number, criterion = st.floats(0, 1), draw(st.sampled_from(CRITERIA))
    way = draw(st.sampled_from(["full", "early", "speculative"]))
    if way == "early":
        return EarlyExit(threshold=draw(number), criterion=criterion)
    if way == "speculative":
        return Speculative(
            draft_tokens=draw(st.integers(1, 5)),
            stop_confidence=draw(number),
            criterion=criterion,
        )
    return FullDepth()


@settings(max_examples=30, deadline=None)
@given(model=models(), strategy=strategies(), temperature=st.sampled_from([0.0, 0.7]))
def test_any_model_and_strategy(model, strategy, temperature):
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
        for n in (4, 1, 9)
    ]
    if isinstance(strategy, EarlyExit) and model.config.upper_kv == "own":
        policies = ("recompute", "propagate", "hole")
        strategy = replace(strategy, kv_policy=policies[model.config.hidden_dim % 3])
    sampling, engine = Sampling(temperature=temperature), NativeEngine(model)
    output = generate(model, prompts, 5, strategy, sampling=sampling, engine=engine)
    # 15 tokens of models so narrow that one rounding may weigh like many: 1 in 1,500 needs over 4
    assert_right(model, prompts, output, strategy, sampling, slack=8)
    first = generate(model, prompts[:1], 5, strategy, sampling=sampling, engine=engine)
    assert exact_rows(first) == exact_rows(output)[:1]


@pytest.mark.parametrize("sampling", ["greedy", "temperature", "top-p"])
@ANY_WAY
def test_a_row_has_the_bits_that_it_has_alone(way, sampling):
    """Alone if it is the first, whose noise is that of row 0; else among other rows."""
    model, strategy = model_and_strategy(way)
    options = {"engine": NativeEngine(model), "sampling": SAMPLINGS[sampling]}
    together = exact_rows(generate(model, MANY, 8, strategy, **options))
    assert exact_rows(generate(model, MANY[:1], 8, strategy, **options)) == together[:1]
    among = [PROMPTS[1], *MANY[1:3], PROMPTS[2], MANY[4]]
    rows = exact_rows(generate(model, among, 8, strategy, **options))
    assert [rows[1], rows[2], rows[4]] == [together[1], together[2], together[4]]
    if sampling == "greedy":
        for row, prompt in enumerate(MANY[:4]):
            alone = generate(model, [prompt], 8, strategy, **options)
            assert exact_rows(alone) == together[row : row + 1]


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        (torch.float32, "greedy"),
        (torch.bfloat16, "greedy"),
        (torch.float32, "temperature"),
        (torch.float32, "top-p"),
    ],
    ids=str,
)
@BOTH
def test_speculation_changes_no_token_of_200_prompts(upper_kv, dtype, sampling):
    """Exactly, whatever the rounding: each row of a chunk has the bits of a step of its own."""
    model = agreeing_model(upper_kv, share=0.2, dtype=dtype)
    prompts = [token_ids(1 + n % 20, seed=n) for n in range(200)]
    options = {"engine": NativeEngine(model), "sampling": SAMPLINGS[sampling]}
    full = generate(model, prompts, 20, FullDepth(), **options)
    strategy = Speculative(draft_tokens=4, stop_confidence=0.1)
    output = generate(model, prompts, 20, strategy, **options)
    assert output.tokens == full.tokens and output.exit_layer == full.exit_layer
    # many drafts were right, or 3 of 4 would have been for nothing; and some were wrong
    assert 200 * 20 < output.stats.decode.lower_layer_calls // 2 < 2 * 200 * 20


@BOTH
def test_dense_model(upper_kv):
    model = tiny_model(upper_kv, exit_layer=4, dtype=torch.float32)
    engine = NativeEngine(model)
    for name in SAMPLINGS:
        got, expected = by_both(model, PROMPTS, 8, FullDepth(), sampling=SAMPLINGS[name])
        assert_same(got, expected)
        got, expected = by_both(model, PROMPTS[3:], 8, FullDepth(), sampling=SAMPLINGS[name])
        assert_same_counts(got, expected)
    for strategy in (EarlyExit(threshold=0.5), Speculative()):
        sentence = f"^{type(strategy).__name__}: the model must have an upper block, got a dense"
        with pytest.raises(ValueError, match=sentence):
            generate(model, PROMPTS, 8, strategy, engine=engine)
