"""A target held while generating: its bound on any text, on a change of domain, in both engines."""

import argparse
import math
import pydoc_data.topics
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.config import ModelConfig, TrainConfig
from lego.controller import ControlledRows, Controller
from lego.decoding import GeneratedToken
from lego.engine import NativeEngine
from lego.generation import ReferenceEngine, generate
from lego.ops.exit_decision import softmax_confidence
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative
from lego.tokenizer import train_tokenizer
from lego.training.phases import train_lego
from lego.training.windows import Windows
from tests.engine_checks import by_both, exact_rows
from tests.models import CRITERIA, POLICIES, model_for, tiny_model
from tests.runs import Silent

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


class Told:
    """A decoder that keeps its thresholds, and whose exits are wrong where they are said to be."""

    def __init__(self, num_rows=1):
        self.thresholds, self.wrong = [math.nan] * num_rows, False

    def set_threshold(self, row, threshold):
        self.thresholds[row] = threshold

    def shallow_token(self, row):
        return 1 if self.wrong else 0


def drive(controller, confidences, wrong=None):
    """One row through these confidences: its Control, and which tokens exited."""
    decoder = Told()
    rows, exits = ControlledRows(controller, decoder, 1), []
    for at, confidence in enumerate(confidences):
        exits.append(confidence >= decoder.thresholds[0])
        decoder.wrong = wrong is not None and wrong[at]
        rows.update(GeneratedToken(0, 0, 2 if exits[-1] else 4, confidence))
    return rows.rows[0], exits


def bound(controller, num_tokens):
    most = 1 if controller.held == "shallow_ratio" else 1 / controller.probe_share
    return (1 + controller.step * most) / (controller.step * num_tokens)


UNIT = st.floats(0, 1, width=32)


@given(
    st.lists(UNIT, min_size=1, max_size=300),
    UNIT,
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None)
def test_the_bound_on_any_confidences(confidences, target, step, start):
    controller = Controller(target=target, step=step, start=start)
    control, exits = drive(controller, confidences)
    assert control.loss == pytest.approx(statistics.fmean(exits))
    assert abs(control.loss - target) <= bound(controller, len(exits)) + 1e-4
    assert -step <= control.lowest <= control.highest <= 1 + step + 1e-6


@given(
    st.lists(st.tuples(UNIT, st.booleans()), min_size=1, max_size=300),
    UNIT,
    st.floats(0.2, 1),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_the_bound_on_any_disagreement(tokens, target, probe_share, seed):
    """Never above; below only where the threshold has reached its end."""
    controller = Controller(
        target=target, held="disagreement", probe_share=probe_share, seed=seed, step=0.1
    )
    control, _ = drive(controller, *zip(*tokens, strict=True))
    assert control.loss <= target + bound(controller, len(tokens)) + 1e-4
    if control.lowest > -0.09:
        assert control.loss >= target - bound(controller, len(tokens)) - 1e-4
    assert control.disagreements <= control.probes <= control.shallow <= control.tokens


def test_an_adversary_cannot_beat_it():
    """Confidences that always fall on the wrong side of the threshold."""
    controller = Controller(target=0.4)
    decoder = Told()
    rows = ControlledRows(controller, decoder, 1)
    for at in range(2000):
        below = rows.rows[0].loss > 0.4 or at == 0
        confidence = max(0.0, decoder.thresholds[0] + (1e-3 if below else -1e-3))
        rows.update(GeneratedToken(0, 0, 4, min(confidence, 1.0)))
    assert abs(rows.rows[0].loss - 0.4) < 0.02


def test_disagreement_is_held_on_average():
    """Exits are wrong with probability 1 - confidence; the estimate comes from a tenth of them."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(20_000, generator=generator)
    wrong = (torch.rand(20_000, generator=generator) > confidence).tolist()
    control, exits = drive(
        Controller(target=0.1, held="disagreement", step=0.005), confidence.tolist(), wrong
    )
    assert abs(control.loss - 0.1) < 0.01
    late = range(5000, 20_000)
    truth = statistics.fmean(exits[at] and wrong[at] for at in late) / 0.9  # a tenth was probed
    assert abs(truth - 0.1) < 0.02
    assert control.probes == pytest.approx(0.1 * control.shallow, rel=0.1)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """2,000 tokens of English and of code: confidences at the exit and what full depth thinks."""
    english = "\n\n".join(pydoc_data.topics.topics.values())[:120_000]
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    tokenizer = train_tokenizer("bpe", english + code, 512)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=4, exit_layer=2, num_heads=4,
        num_kv_heads=2, hidden_dim=64, max_seq_len=100,
    )  # fmt: skip
    train = TrainConfig(seq_len=64, batch_size=16, learning_rate=3e-3, warmup_steps=10)
    texts = [torch.tensor(tokenizer.encode(text)) for text in (english, code)]
    windows = Windows.split(texts[0][2000:].numpy().astype("uint16"), train)
    folder = tmp_path_factory.mktemp("domains")
    model = train_lego(config, train, windows, folder, Silent).model.eval()
    confidence, wrong = {criterion: [] for criterion in CRITERIA}, []
    with torch.no_grad():
        for text in texts:
            states = model(text[:2000].view(-1, 100))
            logits = model.exit_logits(states.exit_state).flatten(0, 1)
            deep = model.final_logits(states.final_state).flatten(0, 1)
            wrong += (logits.argmax(-1) != deep.argmax(-1)).tolist()
            for criterion in CRITERIA[:3]:
                confidence[criterion] += softmax_confidence(logits, criterion).tolist()
            confidence["gate"] += model.gate_score(states.exit_state.flatten(0, 1)).tolist()
    return confidence, wrong


@pytest.mark.parametrize("target", [0.3, 0.6])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_change_of_domain(domains, criterion, target):
    """From English to code: the share of 2,000 tokens within 2 %, and steady on the way."""
    confidence, _ = domains
    _, exits = drive(Controller(target=target), confidence[criterion])
    exits = torch.tensor(exits, dtype=torch.float64)
    for start in (0, 2000):
        assert abs(exits[start : start + 2000].mean() - target) < 0.02
    # shares of 100 tokens once settled: as steady as independent draws would be, or steadier
    shares = exits[2200:].view(-1, 100).mean(dim=1)
    assert shares.std() < (target * (1 - target) / 100) ** 0.5


def test_a_fixed_threshold_does_not_hold_it(domains):
    """What the controller is there for."""
    confidence, _ = domains
    english, code = (torch.tensor(confidence["max_prob"]).view(2, 2000)).unbind()
    threshold = english.quantile(0.5)
    assert abs(float((code >= threshold).double().mean()) - 0.5) > 0.05


def test_disagreement_on_a_change_of_domain(domains):
    """The estimate within 2 % of its target on 2,000 tokens of another kind."""
    confidence, wrong = domains
    controller = Controller(target=0.1, held="disagreement", probe_share=0.5)
    decoder = Told()
    rows, losses = ControlledRows(controller, decoder, 1), []
    for at, value in enumerate(confidence["max_prob"]):
        decoder.wrong, before = wrong[at], rows.rows[0].loss_sum
        rows.update(GeneratedToken(0, 0, 4, value))
        losses.append(rows.rows[0].loss_sum - before)
    for start in (0, 2000):
        assert abs(statistics.fmean(losses[start : start + 2000]) - 0.1) < 0.02


HELD = [
    Controller(target=0.4, step=0.2),
    Controller(target=0.2, held="disagreement", probe_share=0.5, step=0.2, seed=3),
]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=9)], ids=str)
@pytest.mark.parametrize("criterion", ["max_prob", "gate"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("controller", HELD, ids=lambda x: x.held)
def test_both_engines_do_the_same(controller, policy, criterion, sampling):
    model = model_for(policy, dtype=torch.float32)
    strategy = EarlyExit(threshold=0.5, criterion=criterion, kv_policy=policy)
    got, expected = by_both(model, PROMPTS, 40, strategy, controller=controller, sampling=sampling)
    assert (got.tokens, got.exit_layer) == (expected.tokens, expected.exit_layer)
    for one, other in zip(got.control, expected.control, strict=True):
        assert vars(one) == pytest.approx(vars(other), abs=1e-5)
    assert got.stats.decode.head_calls == expected.stats.decode.head_calls


def test_rows_that_end_leave_the_others_their_thresholds():
    """Stop tokens end rows one by one, the first row first."""
    model = tiny_model(dtype=torch.float32)
    whole = generate(model, PROMPTS, 20, EarlyExit(threshold=0.5), controller=HELD[0])
    stops = {"stop_tokens": [whole.tokens[0][3]], "controller": HELD[0]}
    got, expected = by_both(model, PROMPTS, 20, EarlyExit(threshold=0.5), **stops)
    lengths = [len(row) for row in expected.tokens]
    assert lengths[0] <= 4 < max(lengths)
    for output in (got, expected):
        for row, length in enumerate(lengths):
            assert output.tokens[row] == whole.tokens[row][:length]
            assert output.exit_layer[row] == whole.exit_layer[row][:length]


def test_rows_are_probed_apart():
    controller = Controller(target=0.1, held="disagreement", probe_share=0.5)
    decoder = Told(num_rows=2)
    rows, probed = ControlledRows(controller, decoder, 2), []
    for _ in range(30):
        probed.append([math.isinf(threshold) for threshold in decoder.thresholds])
        for row in range(2):
            rows.update(GeneratedToken(row, 0, 4, 0.0))
    first, second = zip(*probed, strict=True)
    assert first != second


@pytest.mark.parametrize("deferral", [False, True])
@pytest.mark.parametrize("controller", HELD, ids=lambda x: x.held)
def test_a_row_alone_does_the_same(controller, deferral):
    model = tiny_model(dtype=torch.float32)
    strategy, engine = EarlyExit(threshold=0.5), NativeEngine(model, deferral=deferral)
    batch = generate(model, PROMPTS, 30, strategy, engine=engine, controller=controller)
    first = generate(model, PROMPTS[:1], 30, strategy, engine=engine, controller=controller)
    assert exact_rows(first) == exact_rows(batch)[:1]
    assert first.control == batch.control[:1]
    assert [control.tokens for control in batch.control] == [30] * 3


def test_what_it_reports_is_what_happened():
    """Thresholds start where it says; exits are those of the tokens; a seed fixes the probes."""
    model = tiny_model(dtype=torch.float32)
    controller = HELD[1]
    outputs = [
        generate(
            model, PROMPTS, 50, EarlyExit(threshold=0.9), engine=NativeEngine(model),
            controller=one,
        )
        for one in (controller, controller, Controller(**vars(controller) | {"seed": 4}))
    ]  # fmt: skip
    assert outputs[0].control == outputs[1].control != outputs[2].control
    for control, layers in zip(outputs[0].control, outputs[0].exit_layer, strict=True):
        assert control.shallow - control.probes == layers.count(2)
        assert control.loss == pytest.approx(control.disagreements / 0.5 / 50)
        assert control.probes > 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_shallow_token_is_that_of_an_exit(criterion, sampling):
    """Of a first token that stayed, and of the one that the same row gives when it exits."""
    model = tiny_model(dtype=torch.float32)
    never, always = (
        EarlyExit(threshold=threshold, criterion=criterion) for threshold in (math.inf, -math.inf)
    )
    exited = generate(model, PROMPTS, 1, always, sampling=sampling).tokens
    prompts = [torch.tensor(ids) for ids in PROMPTS]
    for engine in (NativeEngine(model), ReferenceEngine(model)):
        decoder = engine.decoder(never, sampling, 3, 20)
        decoder.prefill(prompts)
        assert [new.exit_layer for new in decoder.step()] == [4, 4, 4]
        before = decoder.counts.head_calls
        assert [[decoder.shallow_token(row)] for row in range(3)] == exited
        assert decoder.counts.head_calls == before + 3


REFUSED = {
    r"held: must be one of \('shallow_ratio', 'disagreement'\), got 'layers'": {"held": "layers"},
    r"target: must be in \[0, 1\], got 1.5": {"target": 1.5},
    r"target: must be in \[0, 1\], got nan": {"target": math.nan},
    r"step: must be in \(0, 1\], got 0": {"step": 0},
    r"probe_share: must be in \(0, 1\], got 2": {"probe_share": 2},
    r"start: must be in \[0, 1\], got -1": {"start": -1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals(sentence):
    with pytest.raises(ValueError, match=f"^Controller.{sentence}$"):
        Controller(**{"target": 0.5} | REFUSED[sentence])


@pytest.mark.parametrize("strategy", [FullDepth(), Speculative()], ids=str)
def test_only_early_exit_can_be_controlled(strategy):
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="^generate: controller must come with EarlyExit, got"):
        generate(model, PROMPTS, 3, strategy, controller=HELD[0])


def test_an_engine_without_thresholds_is_refused():
    class Fixed:
        def __init__(self, model):
            self.model = model

        def decoder(self, strategy, *where):
            return NativeEngine(self.model).decoder(FullDepth(), *where)

    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="^generate: controller must have a decoder"):
        generate(
            model, PROMPTS, 3, EarlyExit(threshold=0.5), engine=Fixed(model), controller=HELD[0]
        )
