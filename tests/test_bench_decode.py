"""What the decode benchmarks are made of, on tiny models."""

import math
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import decode_cases
from benchmarks.decode_cases import (
    DeviceEngine,
    Engine,
    EngineAt,
    assert_greedy,
    plain_reading,
    random_prompt,
    reference,
)
from benchmarks.forced_exits import between, force_exit, savings
from benchmarks.plot_decode import plots
from benchmarks.prefill import first_token, prefill_flops, reference_first_token
from lego.cost import weights
from lego.strategies import FullDepth
from tests.models import tiny_config, tiny_model

TOKENS = 12


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def prompt(model):
    return random_prompt(model.config, 8)


def test_engine_and_reference_agree_and_are_timed(model, prompt):
    ours, theirs = Engine(model, 20)(prompt, TOKENS), reference(model, FullDepth())(prompt, TOKENS)
    assert len(ours.tokens) == TOKENS and ours.seconds > 0 and theirs.seconds > 0
    assert ours[:2] == theirs[:2]
    assert_greedy(model, prompt, ours)


def test_counts_are_of_the_timed_tokens(model, prompt):
    engine = Engine(model, 20)
    for _ in range(2):
        engine(prompt, TOKENS)
        assert engine.counts.head_calls == TOKENS - 1


def test_a_worse_token_is_noticed(model, prompt):
    run = Engine(model, 20)(prompt, TOKENS)
    run.tokens[-1] = (run.tokens[-1] + 1) % model.config.vocab_size
    with pytest.raises(AssertionError):
        assert_greedy(model, prompt, run)


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_engine_takes_the_same_tokens_again(upper_kv, prompt):
    at = EngineAt(tiny_model(upper_kv, dtype=torch.float32), prompt, TOKENS)
    assert at() > 0 and at() > 0  # which compares the tokens


def test_plain_reading_yields_nothing_but_time(prompt):
    run = plain_reading(4096)(prompt, 3)
    assert run.tokens == [] and run.seconds > 0


def exiting(model, criterion="gate", engine=Engine):
    return engine(model, 60, threshold=math.inf, criterion=criterion)


@pytest.mark.parametrize("engine", [Engine, DeviceEngine])
@pytest.mark.parametrize("criterion", ["gate", "max_prob"])
def test_forced_exits_come_near(model, prompt, criterion, engine):
    forced = force_exit(exiting(model, criterion, engine), prompt, 48, 0.5)
    assert abs(forced.shallow_ratio(model.config.num_layers) - 0.5) < 0.2
    again = forced.engine(prompt, 48)
    assert again[:2] == forced.run[:2]  # the threshold that is left decides as the best try did


@pytest.mark.parametrize(("ratio", "threshold"), [(0, math.inf), (1, -math.inf)])
def test_no_token_exits_or_all_do(model, prompt, ratio, threshold):
    forced = force_exit(exiting(model), prompt, TOKENS, ratio)
    assert forced.threshold == threshold
    assert forced.shallow_ratio(model.config.num_layers) == ratio


def test_device_engine_gives_the_same_a_step_ahead(model, prompt):
    runs, counts = [], []
    for kind in (Engine, DeviceEngine):
        engine = exiting(model, engine=kind)
        force_exit(engine, prompt, 40, 0.5)
        runs.append(engine(prompt, 40)[:2])
        counts.append((engine.counts.upper_layer_calls, engine.counts.head_calls))
    assert runs[0] == runs[1] and counts[0] == counts[1]


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [([0.1, 0.5, 0.9], 0.5, 0.3), ([0.5], 0.2, 0.2), ([0.5], math.inf, math.inf)],
)
def test_between(confidence, threshold, expected):
    assert between(confidence, threshold) == pytest.approx(expected)


def test_savings_of_half_the_time(model, prompt):
    full = Engine(model, 60)
    full(prompt, 40)
    forced = force_exit(exiting(model), prompt, 40, 0.9)
    row = savings(model.config, forced, full.counts, [2.0, 2.0], [1.0, 1.0])
    assert row["speedup"] == [2, 2, 2] and 0.4 < row["true_cost"] < 0.9
    assert row["ideal_speedup"] == pytest.approx(1 / row["true_cost"])
    assert row["realised_savings"] == pytest.approx(0.5 / (1 - row["true_cost"]))


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_first_tokens_agree(upper_kv, prompt):
    model = tiny_model(upper_kv, dtype=torch.float32)
    assert first_token(model, prompt)()[0] == reference_first_token(model, prompt)()[0]


def test_prefill_flops_of_one_token_are_two_a_weight():
    config = tiny_config("own")
    part, width = weights(config), config.num_heads * config.head_dim
    layers = config.exit_layer * part.lower_layer + config.num_upper_layers * part.upper_layer
    expected = 2 * (layers + part.head + config.num_layers * 2 * width)
    assert prefill_flops(config, 1) == expected
    assert prefill_flops(tiny_config(), 1000) < 0.7 * prefill_flops(config, 1000)


@pytest.mark.parametrize("shape", ["seed", "source"])
def test_random_models_say_something_new(shape):
    model = decode_cases.random_model(shape, "float32", vocab_size=4096)
    run = Engine(model, 64)(random_prompt(model.config), 32)
    decode_cases.assert_varied(run.tokens)


def results(test, case, rows):
    return {"name": f"{test}[x]", "params": {"decode_case": case}, "extra_info": {"rows": rows}}


def test_plots_hold_what_was_measured(tmp_path):
    exits = [
        {"criterion": c, "shallow_ratio": r, "speedup": [1 + r, 1, 2], "ideal_speedup": 1 + r}
        for c in ("gate", "max_prob")
        for r in (0.25, 0.5, 0.9)
    ]
    times = {"engine_ms": [2.0, 1.0, 3.0], "reading_ms": [1.0, 1.0, 1.0]}
    figures = plots(
        [
            results("test_early_exit", ["wide", "bfloat16", [0.5]], exits),
            results("test_context", ["wide", "float32"], [{"context": 64, **times}]),
            results("test_depth", ["wide", "float32"], [{"depth": 4, **times}]),
        ]
    )
    assert set(figures) == {"gate", "max_prob", "context", "depth"}
    (axes,) = figures["gate"].axes
    assert axes.get_lines()[0].get_xdata().tolist() == [0.25, 0.5, 0.9]
    figures["gate"].savefig(tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_a_stock_model_has_the_same_logits(prompt):
    pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
    from benchmarks.stock_models import Generates, stock_model

    model = tiny_model("own", dtype=torch.float32)
    stock = stock_model(model)
    with torch.no_grad():
        expected = model.final_logits(model(prompt[None]).final_state)
        torch.testing.assert_close(stock(prompt[None]).logits, expected)
    theirs = Generates(stock, model.config.num_layers)(prompt, TOKENS)
    assert theirs[:2] == Engine(model, 20)(prompt, TOKENS)[:2]


def test_llama_cpp_gives_the_same_tokens(prompt, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install -e '.[rivals]'")
    from benchmarks.rivals import LlamaCpp, write_gguf

    model = tiny_model("own", dtype=torch.float32)
    # llama.cpp asks for rows of whole blocks of 32 values in places
    write_gguf(model, tmp_path / "m.gguf")
    llama = LlamaCpp(tmp_path / "m.gguf", model.config, 32)
    assert llama(prompt, TOKENS)[:2] == Engine(model, 20)(prompt, TOKENS)[:2]
    llama.close()
