"""generate() of an accelerated model: the arguments, settings and results of transformers."""

import math

import pytest
import scipy.stats
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install 'lego-early-exit[hf]')")

from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lego_kernels import library
from lego_kernels.hf import EarlyExitOutput, accelerate
from tests.hf.tiny_models import ragged, tiny_model

pytestmark = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)
PROMPTS = ragged(9, 3, 8)
EXACT = pytest.mark.parametrize("mode", ["full", "speculative"])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def fast_of(model, mode):
    how = {"exit_layer": 2, "threshold": 0.2} if mode != "full" else {}
    return accelerate(model, mode=mode, **how)


def both(model, mode, **arguments):
    """What transformers gives and what the accelerated model gives."""
    return model.generate(**arguments), fast_of(model, mode).generate(**arguments)


def end_tokens(model):
    """The 3rd new token of row 0 and the 6th of row 1."""
    new = model.generate(**PROMPTS, max_new_tokens=8)[:, 9:]
    return new[0, 2].item(), new[1, 5].item()


@EXACT
@pytest.mark.parametrize("how", ["int", "list", "no pad", "config", "passed config"])
def test_eos_ends_a_row_and_pads_it(model, monkeypatch, how, mode):
    first, second = end_tokens(model)
    more = {"max_new_tokens": 24, "eos_token_id": [first, second], "pad_token_id": 96}
    if how == "int":
        more["eos_token_id"] = first
    elif how == "no pad":
        monkeypatch.setattr(model.generation_config, "pad_token_id", None)
        del more["pad_token_id"]
    elif how == "config":
        for name, value in more.items():
            monkeypatch.setattr(model.generation_config, name, value)
        more = {}
    elif how == "passed config":
        more = {"generation_config": GenerationConfig(**more)}
    expected, got = both(model, mode, **PROMPTS, **more)
    pad = first if how == "no pad" else 96
    assert torch.equal(got, expected) and (got[0, 12:] == pad).all()


class Ends(StoppingCriteria):
    """Ends the row of each pair when it holds so many tokens; keeps what it was called with."""

    def __init__(self, *ends):
        self.ends, self.seen = ends, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), scores))
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for row, length in self.ends:
            # a view needs contiguous ids, as transformers passes them
            done[row] = len(input_ids.view(-1)) == length * len(input_ids)
        return done


@EXACT
@pytest.mark.parametrize("eos", [None, 95])
def test_stopping_criteria(model, eos, mode):
    """Without an eos token a row that has ended goes on until all have, as in transformers."""
    seen, rows = [], ((0, 11), (1, 15), (2, 13))
    for which in (model, fast_of(model, mode)):
        ends = Ends(*rows)
        ids = which.generate(
            **PROMPTS, max_new_tokens=24, stopping_criteria=[ends], eos_token_id=eos
        )
        seen.append((ids.tolist(), ends.seen))
    assert seen[0] == seen[1] and len(seen[0][0][0]) == 15
    assert (seen[0][0][0][11:] == [0] * 4) == (eos is not None)


@EXACT
def test_all_rows_end_at_once(model, mode):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.size(1) >= 14  # a bool, which transformers takes too

    expected, got = both(model, mode, **PROMPTS, stopping_criteria=[Stop()], max_new_tokens=20)
    assert torch.equal(got, expected) and got.size(1) == 14
    got = fast_of(model, mode).generate(**PROMPTS, max_time=0.0, max_new_tokens=200)
    assert got.size(1) == 10


@EXACT
def test_lengths_and_inputs(model, mode):
    ids = PROMPTS["input_ids"][:1]
    for arguments in (
        {"inputs": ids, "max_length": 17},
        {"inputs": ids},  # transformers' default of 20 tokens
        {"input_ids": ids[:, :1], "max_new_tokens": 1},
        {"inputs": ids, "max_new_tokens": 4, "num_return_sequences": 1, "num_beams": 1},
        {"max_new_tokens": 5},  # from the bos token
        {"inputs": PROMPTS["input_ids"], "max_new_tokens": 5},  # the mask is that of pad tokens
        {"inputs": ids.int(), "max_new_tokens": 5},
        {"inputs": ids, "max_length": 200 + 56},  # all positions
    ):
        expected, got = both(model, mode, **arguments)
        assert torch.equal(got, expected), arguments


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("mode", ["full", "speculative", "early_exit"])
def test_streamer(model, mode):
    first, _ = end_tokens(model)
    arguments = {**PROMPTS, "max_new_tokens": 12, "eos_token_id": first}
    mine, theirs = Recorder(), Recorder()
    ids = fast_of(model, mode).generate(**arguments, streamer=mine)
    assert mine.calls[0] == PROMPTS["input_ids"].tolist() and mine.calls[-1] == "end"
    assert mine.calls[1:-1] == ids[:, 9:].T.tolist()
    model.generate(**arguments, streamer=theirs)
    assert mode == "early_exit" or mine.calls == theirs.calls


@pytest.mark.parametrize("mode", ["full", "speculative", "early_exit"])
def test_return_dict(model, mode):
    first, _ = end_tokens(model)
    fast, arguments = fast_of(model, mode), {**PROMPTS, "max_new_tokens": 12, "eos_token_id": first}
    out = fast.generate(**arguments, return_dict_in_generate=True)
    assert isinstance(out, EarlyExitOutput) and isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, fast.generate(**arguments)) and out["kv_exact"] is True
    new = out.sequences[:, 9:]
    assert out.exit_layers.shape == out.confidences.shape == new.shape
    ended = (new == first).long().cumsum(1) - (new == first).long() > 0
    assert mode == "early_exit" or ended.any()
    assert torch.equal(out.exit_layers == 0, ended) and out.confidences[ended].isnan().all()
    decided, layers = out.confidences[~ended], out.exit_layers[~ended]
    if mode == "full":
        assert decided.isnan().all() and (layers == 4).all()
    elif mode == "speculative":
        assert (decided > 0).all() and (layers == 4).all()
    else:
        assert torch.equal(layers == 2, decided >= 0.2) and {*layers.tolist()} == {2, 4}


def distribution(model, ids, settings):
    """transformers' own probabilities of the next token after each row."""
    warpers = LogitsProcessorList()
    warpers.append(TemperatureLogitsWarper(settings["temperature"]))
    if settings["top_k"]:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    with torch.no_grad():
        return warpers(ids, model(ids).logits[:, -1]).double().softmax(-1)


@EXACT
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 4, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 8, "top_p": 0.8},
    ],
    ids=["temperature", "top_k", "top_p"],
)
def test_samples_follow_the_distribution_of_transformers(settings, mode):
    """Of pairs of tokens, by chi-squared; the second follows the first."""
    model = tiny_model(vocab_size=11, num_hidden_layers=3)
    prompt, num_draws = torch.tensor([[3, 7, 4]]), 6000
    torch.manual_seed(0)
    ids = fast_of(model, mode).generate(
        prompt, do_sample=True, max_new_tokens=2, num_return_sequences=num_draws, **settings
    )
    first = distribution(model, prompt, settings)[0]
    longer = torch.cat([prompt.expand(11, 3), torch.arange(11)[:, None]], dim=1)
    expected = (first[:, None] * distribution(model, longer, settings)).flatten() * num_draws
    seen = torch.bincount(ids[:, 3] * 11 + ids[:, 4], minlength=121).double()
    assert seen[expected == 0].sum() == 0
    # cells with fewer than 5 expected are one
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    assert len(seen) > 4
    assert scipy.stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_seeds(model):
    """torch.manual_seed fixes the draws; speculation draws what full depth draws."""
    drawn = []
    for mode, seed in (("full", 0), ("full", 0), ("speculative", 0), ("full", 1)):
        torch.manual_seed(seed)
        fast = fast_of(model, mode)
        drawn += [fast.generate(**PROMPTS, do_sample=True, max_new_tokens=16) for _ in "ab"]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert torch.equal(drawn[0], drawn[4]) and torch.equal(drawn[1], drawn[5])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[6])


def test_greedy_leaves_torchs_generator_alone(model):
    before = torch.get_rng_state()
    fast_of(model, "full").generate(**PROMPTS, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_logits_are_refused():
    broken = tiny_model()
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(FloatingPointError, match="logits must be numbers, got NaN"):
        accelerate(broken).generate(**PROMPTS, max_new_tokens=2)
