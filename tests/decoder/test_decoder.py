"""The decoders of lego_kernels at their own level: long prompts, long debts, and their refusals."""

import math
from dataclasses import replace

import pytest
import torch

from lego.decoding import CachedDecoder
from lego.engine import decoder_weights
from lego.ops.exit_decision import softmax_confidence
from lego.strategies import EarlyExit, FullDepth
from lego_kernels import library
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.speculative import SpeculativeDecoder
from lego_kernels.decoder.state import CHUNK_TOKENS
from tests.models import POLICIES, agreeing_model, tiny_model, token_ids

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
ANY_POLICY = pytest.mark.parametrize("policy", POLICIES)
SLOTS = 600
CLOSE = {"atol": 1e-3, "rtol": 1e-3}  # of states of size 5, through hundreds of float32 slots


def long_model(upper_kv, **changes):
    return tiny_model(upper_kv, dtype=torch.float32, max_seq_len=SLOTS, **changes)


def prompts_of(*lengths):
    return [token_ids(length, seed=length) for length in lengths]


def run(decoder, num_steps):
    return [decoder.step() for _ in range(num_steps)]


class Reference:
    """Float64 rows that exit where they are told to; one decoder a row."""

    def __init__(self, model, prompts, policy):
        exact = tiny_model(model.config.upper_kv, max_seq_len=SLOTS)
        exact.load_state_dict(model.state_dict())
        never = FullDepth() if policy is None else EarlyExit(threshold=math.inf, kv_policy=policy)
        self.rows = [CachedDecoder(exact, never, 1, SLOTS) for _ in prompts]
        for row, ids in zip(self.rows, prompts, strict=True):
            row.prefill([ids[:-1]])
        self.last = [ids[-1:] for ids in prompts]

    def assert_agrees(self, steps):
        """Each token is float64's, or within 1e-3 of its logit."""
        for new in (new for step in steps for new in step):
            decoder = self.rows[new.row]
            decoder.threshold_B[:] = -math.inf if new.exit_layer < 4 else math.inf
            logits = decoder.step(self.last[new.row]).logits_BV[0]
            assert logits.max() - logits[new.token] < 1e-3
            self.last[new.row] = torch.tensor([new.token])


@pytest.mark.parametrize("length", [CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 300])
@BOTH
def test_prompts_longer_than_a_chunk(upper_kv, length):
    """The last prompt token is the input of the first step: it is no part of a prompt's chunks."""
    model = long_model(upper_kv)
    prompts = prompts_of(length, 1, 5)
    decoder = Decoder(decoder_weights(model), 3, SLOTS)
    decoder.prefill(prompts)
    num_prompt = length - 1 + 4
    own = upper_kv == "own"
    assert decoder.counts.lower_layer_calls == 2 * num_prompt
    assert decoder.counts.lower_passes == 2 * (math.ceil((length - 1) / CHUNK_TOKENS) + 1)
    assert decoder.counts.upper_layer_calls == (2 * num_prompt if own else 0)
    assert decoder.counts.head_calls == decoder.counts.upper_kv_calls == 0
    Reference(model, prompts, None).assert_agrees(run(decoder, 4))
    calls = decoder.counts.upper_kv_calls
    assert calls == (0 if own else num_prompt + 3 * 4)
    states = model(prompts[0][None]).exit_state[0]
    torch.testing.assert_close(decoder.state.states[0, : len(prompts[0])], states, **CLOSE)


@pytest.mark.parametrize("lengths", [(1,), (3, 150, 1)], ids=["one row", "ragged rows"])
@ANY_POLICY
def test_debts_longer_than_a_chunk(policy, lengths):
    """150 exits, then deep tokens: what is owed takes several calls, before the newest."""
    model, prompts = long_model(POLICIES[policy]), prompts_of(*lengths)
    decoder = Decoder(decoder_weights(model), len(prompts), SLOTS, threshold=0.0, kv_policy=policy)
    decoder.prefill(prompts)
    steps = run(decoder, 150)
    before = decoder.counts
    decoder.set_threshold(math.inf)
    steps += run(decoder, 3)
    Reference(model, prompts, policy).assert_agrees(steps)
    counts, num_rows = decoder.counts, len(lengths)
    owed = 150 * num_rows
    if policy == "exact":
        owed += sum(length - 1 for length in lengths)
    projected = {"exact": owed + 3 * num_rows, "propagate": owed, "recompute": 0, "hole": 0}
    assert counts.upper_kv_calls == projected[policy]
    run_deep = 3 * num_rows + (owed if policy == "recompute" else 0)
    assert counts.upper_layer_calls - before.upper_layer_calls == 2 * run_deep
    if policy in ("exact", "propagate"):
        extra = 2 if policy == "exact" else 0
        assert counts.upper_kv_passes == math.ceil(owed / CHUNK_TOKENS) + extra


@ANY_POLICY
def test_more_rows_than_a_chunk_holds(policy):
    """130 rows widen the chunk to 130; no room is left beside the newest for what is owed."""
    model = long_model(POLICIES[policy])
    prompts = prompts_of(*(1 + n % 4 for n in range(130)))
    decoder = Decoder(decoder_weights(model), 130, 20, threshold=0.0, kv_policy=policy)
    decoder.prefill(prompts)
    steps = run(decoder, 2)
    decoder.set_threshold(math.inf)
    steps += run(decoder, 2)
    some = (0, 77, 129)
    kept = [[new for new in step if new.row in some] for step in steps]
    assert [len(step) for step in kept] == [3] * 4
    kept = [[new._replace(row=some.index(new.row)) for new in step] for step in kept]
    Reference(model, [prompts[row] for row in some], policy).assert_agrees(kept)


@BOTH
def test_speculative_chunks_longer_than_a_pass(upper_kv):
    """40 rows with 5 drafts each, all of them right, are 200 states to verify, in two passes."""
    model = agreeing_model(upper_kv, share=0.0, dtype=torch.float32, max_seq_len=SLOTS)
    weights, prompts = decoder_weights(model), prompts_of(*range(1, 41))
    decoder = SpeculativeDecoder(weights, 40, 60, draft_tokens=5, stop_confidence=0.0)
    full = Decoder(weights, 40, 60)
    for one in (decoder, full):
        one.prefill(prompts)
    before = decoder.counts.upper_passes
    got, expected = run(decoder, 2), run(full, 10)
    assert decoder.counts.upper_passes == before + 2 * 2 * 2
    for row in range(40):
        mine = [new.token for step in got for new in step if new.row == row]
        assert mine == [step[row].token for step in expected]


@pytest.mark.parametrize("num_drafts", [1, 5])
def test_drafts_report_what_the_exit_is_worth(num_drafts):
    model, prompt = long_model("own"), token_ids(9)
    decoder = SpeculativeDecoder(
        decoder_weights(model), 1, 60, draft_tokens=num_drafts, stop_confidence=0.0
    )
    decoder.prefill([prompt])
    new = decoder.step()
    text = torch.cat((prompt, torch.tensor([x.token for x in new])))
    logits = model.exit_logits(model(text[None]).exit_state)[0, len(prompt) - 1 : -1]
    worth = softmax_confidence(logits, "max_prob").tolist()
    assert [x.confidence for x in new] == pytest.approx(worth, abs=1e-5)
    assert {x.exit_layer for x in new} == {4}


def where_rows_are(decoder):
    state = decoder.state
    return [values.tolist() for values in (state.position, state.last, state.upper_len)]


def decoders(weights, num_rows, num_slots):
    return [
        Decoder(weights, num_rows, num_slots),
        Decoder(weights, num_rows, num_slots, threshold=0.4),
        Decoder(weights, num_rows, num_slots, threshold=0.5, criterion="gate"),
        SpeculativeDecoder(weights, num_rows, num_slots),
    ]


@BOTH
def test_a_full_row_is_refused_and_the_others_go_on(upper_kv):
    """Row 1 has 8 of 9 slots after its prompt; the refusal comes before anything runs."""
    weights, prompts = decoder_weights(long_model(upper_kv)), prompts_of(3, 9, 2)
    for decoder, free in zip(decoders(weights, 3, 9), decoders(weights, 3, 99), strict=True):
        decoder.prefill(prompts)
        free.prefill(prompts)
        first = decoder.step()
        both = [[x for x in step if x.row == 1] for step in (first, free.step())]
        assert str(both[0]) == str(both[1][:1])
        before, where = decoder.counts, where_rows_are(decoder)
        sentence = "^Decoder: row 1 must hold less than num_slots=9 tokens, got 9$"
        for _ in range(2):
            with pytest.raises(ValueError, match=sentence):
                decoder.step()
        assert decoder.counts == before and where_rows_are(decoder) == where
        decoder.finish([1])
        rows = {new.row for step in run(decoder, 1) for new in step}
        assert rows == {0, 2}


REFUSED_PROMPTS = {
    "prompts must be 2, one for each row, got 1": [[1]],
    "prompts must be 2, one for each row, got 3": [[1], [2], [3]],
    r"prompt 1 must be \[T\] with T in \[1, num_slots=9\], got \(0,\)": [[1], []],
    r"prompt 1 must be \[T\] with T in \[1, num_slots=9\], got \(10,\)": [[1], [2] * 10],
    r"prompt 0 must be \[T\] with T in \[1, num_slots=9\], got \(1, 2\)": [[[1, 2]], [1]],
    r"prompt 0 must be \[T\] with T in \[1, num_slots=9\], got \(\)": [4, [1]],
    r"prompt 1 must hold ids in \[0, 50\), got -1": [[1, 2, 3], [4, -1]],
    r"prompt 1 must hold ids in \[0, 50\), got 50": [[1, 2, 3], [50, 4]],
}


@pytest.mark.parametrize("sentence", REFUSED_PROMPTS)
def test_prompts_are_checked_before_anything_runs(sentence):
    weights = decoder_weights(long_model("own"))
    bad = [torch.tensor(ids, dtype=torch.int64) for ids in REFUSED_PROMPTS[sentence]]
    for decoder, other in zip(decoders(weights, 2, 9), decoders(weights, 2, 9), strict=True):
        with pytest.raises(ValueError, match=f"^Decoder: {sentence}$"):
            decoder.prefill(bad)
        assert decoder.counts == Counts() and where_rows_are(decoder) == [[0, 0]] * 3
        for one in (decoder, other):
            one.prefill(prompts_of(2, 3))
        assert str(run(decoder, 3)) == str(run(other, 3))


@BOTH
def test_a_new_prompt_starts_over(upper_kv):
    weights = decoder_weights(long_model(upper_kv))
    for decoder, fresh in zip(decoders(weights, 2, 20), decoders(weights, 2, 20), strict=True):
        decoder.prefill(prompts_of(7, 4))
        run(decoder, 3)
        for one in (decoder, fresh):
            one.prefill(prompts_of(2, 5))
        assert str(run(decoder, 4)) == str(run(fresh, 4))


@BOTH
def test_finished_and_unknown_rows(upper_kv):
    """Rows that go, in any order, twice or never there, change nothing for those that stay."""
    weights, prompts = decoder_weights(long_model(upper_kv)), prompts_of(3, 1, 6, 2)
    for decoder, whole in zip(decoders(weights, 4, 40), decoders(weights, 4, 40), strict=True):
        steps = []
        for one in (decoder, whole):
            one.prefill(prompts)
        for gone in ([], [2], [2, 99, -1], [0]):
            decoder.finish(gone)
            steps.append(decoder.step())
        assert [{new.row for new in step} for step in steps] == [
            {0, 1, 2, 3}, {0, 1, 3}, {0, 1, 3}, {1, 3},
        ]  # fmt: skip
        for step, all_rows in zip(steps, run(whole, 4), strict=True):
            live = {new.row for new in step}
            assert str(step) == str([new for new in all_rows if new.row in live])
        decoder.finish([1, 3])
        before = decoder.counts
        assert decoder.step() == [] and decoder.counts == before


POLICY = r"kv_policy must be one of \('recompute', 'propagate', 'hole'\), got 'exact'"
CRITERION = r"criterion must be one of \('max_prob', 'margin', 'entropy', 'gate'\), got 'best'"
REFUSED = {
    "num_rows must be >= 1, got 0": {"num_rows": 0},
    rf"num_slots must be in \[1, {SLOTS}\], got 0": {"num_slots": 0},
    rf"num_slots must be in \[1, {SLOTS}\], got {SLOTS + 1}": {"num_slots": SLOTS + 1},
    "threshold must be a number, got nan": {"threshold": math.nan},
    CRITERION: {"threshold": 0.5, "criterion": "best"},
    POLICY: {"threshold": 0.5, "kv_policy": "exact"},
    r"kv_policy must be .*, got 'none'": {"kv_policy": "none"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_decoder_refuses(sentence):
    arguments = {"num_rows": 1, "num_slots": 9} | REFUSED[sentence]
    with pytest.raises(ValueError, match=f"^Decoder: {sentence}$"):
        Decoder(decoder_weights(long_model("own")), **arguments)


@pytest.mark.parametrize("policy", ["recompute", "propagate", "hole"])
def test_exit_state_weights_have_one_policy(policy):
    weights = decoder_weights(long_model("exit_state"))
    sentence = rf"^Decoder: kv_policy must be one of \('exact',\), got '{policy}'$"
    with pytest.raises(ValueError, match=sentence):
        Decoder(weights, 1, 9, threshold=0.5, kv_policy=policy)


SPECULATIVE_REFUSED = {
    "draft_tokens must be >= 1, got 0": {"draft_tokens": 0},
    "stop_confidence must be a number, got nan": {"stop_confidence": math.nan},
    CRITERION: {"criterion": "best"},
    "num_rows must be >= 1, got 0": {"num_rows": 0},
}


@pytest.mark.parametrize("sentence", SPECULATIVE_REFUSED)
def test_speculative_refuses(sentence):
    arguments = {"num_rows": 1, "num_slots": 9} | SPECULATIVE_REFUSED[sentence]
    with pytest.raises(ValueError, match=f"^Decoder: {sentence}$"):
        SpeculativeDecoder(decoder_weights(long_model("own")), **arguments)


@BOTH
def test_weights_without_an_exit_to_decide_on(upper_kv):
    ungated = replace(decoder_weights(long_model(upper_kv)), gate=None)
    sentence = "^Decoder: criterion gate needs weights with a gate, got none$"
    for refuse in (
        lambda: Decoder(ungated, 1, 9, threshold=0.5, criterion="gate"),
        lambda: SpeculativeDecoder(ungated, 1, 9, criterion="gate"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refuse()
    Decoder(ungated, 1, 9, threshold=0.5)
    dense = decoder_weights(long_model(upper_kv, exit_layer=4))
    sentence = "^Decoder: the model must have an upper block to exit, got a dense model$"
    for refuse in (
        lambda: Decoder(dense, 1, 9, threshold=0.5),
        lambda: SpeculativeDecoder(dense, 1, 9),
    ):
        with pytest.raises(ValueError, match=sentence):
            refuse()
    decoder = Decoder(dense, 1, 9)
    decoder.prefill(prompts_of(4))
    assert [new.exit_layer for step in run(decoder, 3) for new in step] == [4, 4, 4]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=9)], ids=["greedy", "top-k"]
)
@pytest.mark.parametrize("which", range(4))
def test_a_decoder_goes_on_once_its_weights_are_numbers_again(which, sampling):
    """A step that ends in NaN logits has moved no row on."""
    model = long_model("exit_state", tie_embeddings=False)
    weights = decoder_weights(model)
    decoder, fresh = (decoders(weights, 2, 40)[which] for _ in "ab")
    for one in (decoder, fresh):
        one.prefill(prompts_of(3, 6))
    steps = run(decoder, 2)
    model.head.weight[4, 3] = math.nan
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="^generate: logits must be numbers, got NaN$"):
            decoder.step()
    model.load_state_dict(long_model("exit_state", tie_embeddings=False).state_dict())
    assert str(steps + run(decoder, 3)) == str(run(fresh, 5))
