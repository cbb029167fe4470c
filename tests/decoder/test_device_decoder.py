"""DeviceDecoder against Decoder, whose tokens, exits and confidences it must give."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lego_kernels.decoder import graph_step
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decoder import Decoder, NewToken
from lego_kernels.decoder.device_decoder import MAX_IN_FLIGHT, DeviceDecoder
from lego_kernels.decoder.device_exits import StepRecord
from lego_kernels.decoder.graph_step import StepParts, choose_mode, step_in_mode
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.library import NOT_LOADED
from tests.device_decoder_cases import (
    LENGTHS,
    SLOTS,
    STEPS,
    STOPS,
    alike,
    prompts,
    run,
    same,
    setup,
)
from tests.models import CRITERIA, VARIANTS, midway, token_ids

pytestmark = pytest.mark.skipif(bool(NOT_LOADED["CPU"]), reason=NOT_LOADED["CPU"] or "native")

CPU = torch.device("cpu")


def pair(weights: DecoderWeights, **options: Any) -> tuple[list[NewToken], list[NewToken]]:
    """What both decoders give."""
    device_options = {name: options.pop(name) for name in ("max_pending",) if name in options}
    expected = run(Decoder(weights, len(LENGTHS), SLOTS, **options))
    got = run(DeviceDecoder(weights, len(LENGTHS), SLOTS, **options, **device_options))
    return got, expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_full_depth(upper_kv, variant):
    weights = setup(upper_kv=upper_kv, **VARIANTS[variant]).weights
    got, expected = pair(weights)
    assert same(got, expected)
    assert len(got) == 6 + 14 + STEPS


def test_dense_model():
    weights = setup(num_layers=3, exit_layer=3).weights
    assert not weights.upper
    assert same(*pair(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_early_exit(criterion, dtype):
    weights, threshold = setup(criterion, dtype)
    got, expected = pair(weights, threshold=threshold, criterion=criterion, max_pending=3)
    assert same(got, expected)
    assert len({new.exit_layer for new in got}) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_early_exit_of_variants(variant):
    weights, threshold = setup(**VARIANTS[variant])
    assert same(*pair(weights, threshold=threshold))


@pytest.mark.parametrize("max_pending", [1, 2, 16])
def test_window_of_any_size(max_pending):
    """At a threshold that few tokens miss, most windows fill up before one stays."""
    weights, _ = setup()
    new = run(Decoder(weights, 3, SLOTS, threshold=0.0))
    low = midway([token.confidence for token in new], share=0.9)
    got, expected = pair(weights, threshold=low, max_pending=max_pending)
    assert same(got, expected)
    assert 0 < sum(token.exit_layer == weights.num_layers for token in got) < len(got) / 2


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("criterion", ["max_prob", "gate"])
def test_all_or_none_exits(criterion, threshold):
    weights, _ = setup(criterion)
    assert same(*pair(weights, threshold=threshold, criterion=criterion, max_pending=4))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, seed=3),
        Sampling(temperature=0.8, top_k=5, seed=3),
        Sampling(temperature=1.5, top_p=0.8, seed=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_sampling(threshold, sampling):
    weights = setup().weights
    got, expected = pair(weights, threshold=threshold, sampling=sampling)
    # the logits that a filter needs are a product of all rows, or of those that stay: other bits
    assert alike(got, expected) if sampling.filters else same(got, expected)
    assert not same(got, pair(weights, threshold=threshold)[0])


def test_row_does_not_depend_on_its_company():
    weights, threshold = setup()
    together = run(DeviceDecoder(weights, 3, SLOTS, threshold=threshold))
    alone = DeviceDecoder(weights, 1, SLOTS, threshold=threshold)
    alone.prefill(prompts()[2:])
    wanted = [new._replace(row=0) for new in together if new.row == 2]
    assert same([new for _ in range(STEPS) for new in alone.step()], wanted)


def test_prefill_takes_a_decoder_back():
    weights, threshold = setup()
    decoder = DeviceDecoder(weights, 3, SLOTS, threshold=threshold, max_pending=2)
    decoder.prefill([token_ids(7, seed=s) for s in (20, 21, 22)])
    for _ in range(10):
        decoder.step()
    fresh = run(DeviceDecoder(weights, 3, SLOTS, threshold=threshold, max_pending=2))
    assert same(run(decoder), fresh)


def test_prompt_of_several_chunks():
    weights, threshold = setup(max_seq_len=300)
    long = [token_ids(280, seed=5), token_ids(3, seed=6)]
    decoders = [kind(weights, 2, 300, threshold=threshold) for kind in (Decoder, DeviceDecoder)]
    for decoder in decoders:
        decoder.prefill(long)
    expected, got = ([new for _ in range(8) for new in d.step()] for d in decoders)
    assert same(got, expected)


def test_counts_of_full_depth_are_those_of_decoder():
    for upper_kv in ("exit_state", "own"):
        weights = setup(upper_kv=upper_kv).weights
        decoders = [kind(weights, 3, SLOTS) for kind in (Decoder, DeviceDecoder)]
        for decoder in decoders:
            run(decoder)
        expected, got = (decoder.counts for decoder in decoders)
        assert replace(got, upper_kv_passes=0) == replace(expected, upper_kv_passes=0)
        # a prompt's tokens as it is read, and a step's
        passes = 2 + STEPS if upper_kv == "exit_state" else 0
        assert got.upper_kv_passes == passes


def test_counts_of_early_exit():
    weights, threshold = setup()
    decoder = DeviceDecoder(weights, 3, SLOTS, threshold=threshold, max_pending=4)
    tokens, num_lower, num_upper = run(decoder), len(weights.lower), len(weights.upper)
    prompt_tokens, N = sum(LENGTHS) - 3, len(tokens)
    steps = _steps(tokens)
    deep = [[new for new in step if new.exit_layer > num_lower] for step in steps]
    num_deep, deep_steps = sum(map(len, deep)), sum(map(bool, deep))
    pending = calls = passes = 0
    # all live rows wait equally long, since they are filled together; a finished one waits for ever
    for step, stayed in zip(steps, deep, strict=True):
        pending += 1
        if stayed or pending == 4:
            calls, passes, pending = calls + pending * len(step), passes + 1, 0
    counts = decoder.counts
    assert counts.lower_layer_calls == num_lower * (prompt_tokens + N)
    assert counts.lower_passes == num_lower * (2 + STEPS)
    assert counts.upper_layer_calls == num_upper * num_deep
    assert counts.upper_passes == num_upper * deep_steps
    assert counts.head_calls == N + num_deep
    assert counts.head_passes == STEPS + deep_steps
    assert counts.upper_kv_passes == 2 + passes
    assert counts.upper_kv_calls == prompt_tokens + calls


def _steps(tokens: list[NewToken]) -> list[list[NewToken]]:
    steps: list[list[NewToken]] = []
    for new in tokens:
        if not steps or steps[-1][-1].row >= new.row:
            steps.append([])
        steps[-1].append(new)
    return steps


def test_counts_by_the_gate():
    weights, threshold = setup("gate")
    decoder = DeviceDecoder(weights, 3, SLOTS, threshold=threshold, criterion="gate")
    num_tokens = len(run(decoder))
    counts = decoder.counts
    assert counts.gate_calls == counts.head_calls == num_tokens
    assert counts.gate_passes == counts.head_passes == STEPS
    assert Counts() == DeviceDecoder(weights, 3, SLOTS).counts


def test_launch_ahead_of_collect():
    """One step ahead of the host: the same tokens, none of a row that is finished meanwhile."""
    weights, threshold = setup()
    expected = run(Decoder(weights, 3, SLOTS, threshold=threshold))
    decoder = DeviceDecoder(weights, 3, SLOTS, threshold=threshold)
    assert decoder.collect() == []
    decoder.prefill(prompts())
    decoder.launch()
    got = []
    for step in range(STEPS):
        decoder.finish(STOPS.get(step, []))
        if step + 1 < STEPS:
            decoder.launch()
        got += decoder.collect()
    assert same(got, expected)
    assert decoder.collect() == []


def test_too_many_in_flight():
    decoder = DeviceDecoder(setup().weights, 3, SLOTS)
    decoder.prefill(prompts())
    for _ in range(MAX_IN_FLIGHT):
        decoder.launch()
    with pytest.raises(RuntimeError, match="must leave less than 4 steps in flight, got 4"):
        decoder.launch()
    assert [len(decoder.collect()) for _ in range(MAX_IN_FLIGHT + 1)] == [3] * MAX_IN_FLIGHT + [0]


def test_full_row():
    weights, threshold = setup()
    decoder = DeviceDecoder(weights, 2, 6, threshold=threshold, max_pending=3)
    decoder.prefill([token_ids(5), token_ids(2)])
    decoder.step(), decoder.step()
    with pytest.raises(ValueError, match="row 0 must hold less than num_slots=6 tokens, got 6"):
        decoder.step()
    decoder.finish([0, 7])
    rows = [new.row for _ in range(3) for new in decoder.step()]  # with row 0 at the very end
    assert rows == [1, 1, 1]
    decoder.finish([1])
    assert decoder.step() == []


def test_nan_logits():
    weights, _ = setup()
    head = weights.head.clone()
    head[3] = torch.nan
    decoder = DeviceDecoder(replace(weights, head=head), 1, 8)
    decoder.prefill([token_ids(3)])
    with pytest.raises(FloatingPointError, match="^generate: logits must be numbers, got NaN$"):
        decoder.step()


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_nan_after_the_exit(threshold):
    weights, _ = setup()
    assert weights.final_norm is not None
    bad = replace(weights, final_norm=torch.full_like(weights.final_norm, torch.nan))
    decoder = DeviceDecoder(bad, 3, SLOTS, threshold=threshold)
    with pytest.raises(FloatingPointError):
        run(decoder)
    run(DeviceDecoder(bad, 3, SLOTS, threshold=0.0))  # none stays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 0}, "Decoder: num_rows must be >= 1, got 0"),
        ({"num_slots": 65}, r"Decoder: num_slots must be in \[1, 64\], got 65"),
        ({"max_pending": 0}, "DeviceDecoder: max_pending must be >= 1, got 0"),
        ({"threshold": float("nan")}, "threshold must be a number, got nan"),
        ({"threshold": 0.5, "criterion": "max"}, "criterion must be"),
        ({"mode": "graph"}, "mode must be auto or one of .*, got 'graph'"),
        ({"mode": "segments"}, "mode segments must work here, but a CUDA graph needs a CUDA"),
    ],
    ids=str,
)
def test_bad_options(changes, message):
    weights = setup().weights
    with pytest.raises(ValueError, match=message):
        DeviceDecoder(weights, **({"num_rows": 2, "num_slots": 8} | changes))


def test_model_that_only_decoder_serves():
    weights = setup(upper_kv="own").weights
    with pytest.raises(ValueError, match="must have upper K and V from the exit state.* Decoder$"):
        DeviceDecoder(weights, 1, 8, threshold=0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([token_ids(3)], "prompts must be 2, one for each row, got 1"),
        ([token_ids(3), token_ids(9)], r"prompt 1 must be \[T\] with T in .*=8\], got \(9,\)"),
        ([token_ids(3), token_ids(0)], r"prompt 1 must be \[T\]"),
        ([torch.tensor([50]), token_ids(1)], r"prompt 0 must hold ids in \[0, 50\), got 50"),
        ([torch.tensor([1.5]), token_ids(1)], r"prompt 0 must be int64, got torch.float32"),
        ([torch.tensor([-1]), token_ids(1)], r"prompt 0 must hold ids in \[0, 50\), got -1"),
    ],
    ids=str,
)
def test_bad_prompts(wrong, message):
    decoder = DeviceDecoder(setup().weights, 2, 8)
    with pytest.raises(ValueError, match=f"Decoder: {message}"):
        decoder.prefill(wrong)


def test_modes_on_the_cpu():
    mode, why = choose_mode("auto", CPU)
    assert mode == "host_branch"
    assert why.count("a CUDA graph needs a CUDA device, got cpu") == 2
    assert choose_mode("host_branch", CPU) == (mode, why)
    decoder = DeviceDecoder(setup().weights, 1, 8)
    assert (decoder.mode, decoder.why_mode, decoder.policy) == (mode, why, "exact")


def test_first_mode_that_works(monkeypatch):
    works = {"conditional": "the driver is old", "segments": "", "host_branch": ""}
    monkeypatch.setattr(graph_step, "mode_problems", lambda device, filters: works)
    assert choose_mode("auto", CPU) == ("segments", "not conditional: the driver is old")
    assert choose_mode("host_branch", CPU)[1].endswith("not segments: another was asked for")
    works["conditional"] = ""
    assert choose_mode("auto", CPU) == ("conditional", "IF nodes work here")


@pytest.mark.parametrize("flags", [None, (0, 0), (1, 0), (1, 1), (0, 1)], ids=str)
def test_parts_that_run(flags):
    ran: list[str] = []
    parts = StepParts(
        before=lambda: ran.append("before"),
        fill=lambda: ran.append("fill"),
        deep=lambda: ran.append("deep"),
        after=lambda: ran.append("after"),
        flags=None if flags is None else torch.tensor(flags, dtype=torch.bool),
    )
    step_in_mode("host_branch", parts)()
    fill, deep = flags or (1, 1)
    assert ran == ["before"] + ["fill"] * fill + ["deep"] * (fill and deep) + ["after"]


def test_record_is_one_block():
    record = StepRecord(3, CPU)
    record.token.fill_(-1)
    for values in (record.confidence, record.lse, record.deep_lse):
        values.fill_(torch.nan)
    record.wants.fill_(True)
    record.flags.fill_(True)
    other = StepRecord(3, CPU)
    other.block.copy_(record.block)
    assert other.token.tolist() == [-1] * 3 and other.wants.all() and other.flags.all()
    assert other.deep_lse.isnan().all() and other.confidence.isnan().all()


class Calls(TorchDispatchMode):
    """Names of the ops that are called, but for those that make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


# in place, or with out=; none waits for the device
OPS_IN_A_GRAPH = {
    "aten.add.out",
    "aten.add_.Tensor",
    "aten.any.out",
    "aten.ge.Tensor_out",
    "aten.gt.Tensor_out",
    "aten.index_copy_.default",
    "aten.index_select.out",
    "aten.logical_or.out",
    "aten.where.self_out",
}


@pytest.mark.parametrize("criterion", [None, "max_prob", "gate"])
def test_parts_of_a_step_allocate_nothing(criterion):
    """What a graph would hold, by the names of the ops: all but ours are known to be capturable."""
    weights, threshold = setup(criterion or "max_prob", qkv_bias=True)
    options = {"threshold": threshold, "criterion": criterion} if criterion else {}
    sampling = Sampling(temperature=0.7)
    decoder = DeviceDecoder(weights, 3, SLOTS, sampling=sampling, **options)
    decoder.prefill(prompts())
    with Calls() as calls:
        for part in (decoder._before, decoder._fill, decoder._deep, decoder._after):
            part()
    foreign = {name for name in calls.names if not name.startswith("lego_kernels.")}
    assert foreign <= OPS_IN_A_GRAPH
    assert len(calls.names - foreign) >= 5


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_step_without_a_prompt(threshold):
    weights = setup().weights
    decoders = [kind(weights, 2, 8, threshold=threshold) for kind in (Decoder, DeviceDecoder)]
    expected, got = ([new for _ in range(4) for new in d.step()] for d in decoders)
    assert same(got, expected)
