"""The decode step on a GPU: exits decided inside a CUDA graph, and what an IF node costs.

One row, greedy, random weights, K and V of the upper block from the exit state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.decode_cases import DeviceEngine, random_model, random_prompt
from benchmarks.device_exits import exit_race
from benchmarks.op_timing import copy_bandwidth, gpu_round, read_bandwidth
from benchmarks.tables import Measure, measured
from lego.config import Criterion
from lego.timing import Spread, paired_seconds
from lego_kernels.decoder.device_decoder import MAX_IN_FLIGHT
from lego_kernels.decoder.graph_step import (
    MODES,
    body_stream,
    captured,
    if_node,
    mode_problems,
)

__all__ = ["measured"]

pytestmark = pytest.mark.gpu

RATIOS = (0, 0.25, 0.5, 0.656, 0.9, 1)
NUM_TOKENS = 33
ROUNDS = 7
NODES_IN_GRAPH = 16


class Case(NamedTuple):
    shape: str
    dtype: str
    criterion: Criterion


CASES = [
    Case("source", "float32", "gate"),
    Case("gpt2", "bfloat16", "gate"),
    Case("llama1b", "bfloat16", "gate"),
]
MORE_CASES = [
    Case("source", "float32", "max_prob"),
    Case("seed", "float32", "gate"),
    Case("wide", "float32", "gate"),
    Case("smol", "bfloat16", "gate"),
    Case("llama1b", "bfloat16", "max_prob"),
]


def test_launches(measured: Measure) -> None:
    """What the host asks of CUDA for a step: to replay a graph and to copy, and never to wait."""
    model = random_model("seed", "float32", "cuda", upper_kv="exit_state")
    prompt = random_prompt(model.config)
    engine = DeviceEngine(model, len(prompt) + 64, threshold=0.5, criterion="gate")
    engine(prompt, 8)

    def work() -> dict[str, Any]:
        assert engine.decoder.mode == "conditional", engine.decoder.why_mode
        calls = runtime_calls(engine.decoder.launch, MAX_IN_FLIGHT)
        assert calls["cudaGraphLaunch"] == MAX_IN_FLIGHT, calls
        assert not any("Synchronize" in name or name == "cudaMemcpy" for name in calls), calls
        rows = [{"call": name, "per_step": n / MAX_IN_FLIGHT} for name, n in sorted(calls.items())]
        return {"mode": engine.decoder.mode, "steps": MAX_IN_FLIGHT, "rows": rows}

    measured(work)


def test_if_nodes(measured: Measure) -> None:
    """Microseconds that 1 to 4 nested IF nodes add, taken and not, over the kernels they run."""
    x = torch.zeros(1, device="cuda")
    taken, skipped = (torch.full((1,), value, device="cuda") for value in (True, False))

    def chained(work: Callable[[], None]) -> Callable[[], float]:
        def all_of_them() -> None:
            for _ in range(NODES_IN_GRAPH):
                work()

        # an IF node is for captures alone
        replay = captured(all_of_them, warm_up=lambda: _kernels(x, 1))
        return gpu_round(replay, NODES_IN_GRAPH)

    depths = range(1, 5)
    for depth in range(4):
        body_stream(taken, depth)  # made now, not inside a capture
    rounds = {f"{n} kernels": chained(lambda n=n: _kernels(x, n)) for n in (1, *depths, 5)}
    for depth in depths:
        for name, flag in (("taken", taken), ("skipped", skipped)):
            rounds[f"{name} {depth}"] = chained(lambda f=flag, d=depth: _nested(x, f, d))

    def work() -> dict[str, Any]:
        seconds = paired_seconds(rounds, num_rounds=ROUNDS)

        def added(name: str, num_kernels: int) -> list[float]:
            pairs = zip(seconds[name], seconds[f"{num_kernels} kernels"], strict=True)
            spread = Spread.of([1e6 * (with_nodes - without) for with_nodes, without in pairs])
            return [spread.median, spread.low, spread.high]

        rows = [
            {
                "nested": depth,
                "taken_us": added(f"taken {depth}", depth + 1),
                "skipped_us": added(f"skipped {depth}", 1),
            }
            for depth in depths
        ]
        return {"rows": rows}

    measured(work)


def test_exits(case: Case, measured: Measure) -> None:
    """Full depth in one graph, and exits at forced ratios in every mode."""
    model = random_model(case.shape, case.dtype, "cuda", upper_kv="exit_state")
    prompt = random_prompt(model.config)
    problems = mode_problems(torch.device("cuda", 0))

    def work() -> dict[str, Any]:
        return exit_race(
            model,
            prompt,
            NUM_TOKENS,
            criterion=case.criterion,
            ratios=RATIOS,
            modes=[mode for mode in MODES if not problems[mode]],
            num_rounds=ROUNDS,
        ) | {
            "mode_problems": problems,
            "read_gb_per_s": read_bandwidth("cuda") / 1e9,
            "copy_gb_per_s": copy_bandwidth("cuda") / 1e9,
        }

    measured(work)


def runtime_calls(work: Callable[[], object], times: int) -> dict[str, int]:
    """CUDA runtime calls that the host makes meanwhile, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("measured"):
            for _ in range(times):
                work()
        torch.cuda.synchronize()
    events = profile.events()
    (span,) = (e.time_range for e in events if e.name == "measured" and e.device_type.name == "CPU")
    calls: Counter[str] = Counter(
        # some versions of a call have a suffix
        re.sub(r"_v\d+$", "", event.name)
        for event in events
        if event.name.startswith("cuda") and span.start <= event.time_range.start <= span.end
    )
    return dict(calls)


def _kernels(x: Tensor, count: int) -> None:
    for _ in range(count):
        x.add_(1)


def _nested(x: Tensor, flag: Tensor, num_nodes: int, depth: int = 0) -> None:
    """A kernel, and the same again inside an IF node, so many times."""
    x.add_(1)
    if depth < num_nodes:
        with if_node(flag, depth):
            _nested(x, flag, num_nodes, depth + 1)
