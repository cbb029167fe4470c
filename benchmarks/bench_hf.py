"""transformers models: generate() of their own against accelerate(), one thread, one row, greedy.

Tokens are compared first. test_full takes random weights; test_speculative a run that `lego run`
trained with upper_kv="own", named by --run.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.decode_cases import Runner, random_model, random_prompt
from benchmarks.races import ROUNDS, check_tokens, race
from benchmarks.tables import Measure, measured, milliseconds, one_thread
from lego.hf_checkpoint import Export, export_checkpoint
from lego.run_folder import RunFolder
from lego.timed_generation import prompt_windows
from lego.timing import paired_seconds, ratio_spread

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

from transformers import AutoModelForCausalLM

from benchmarks.stock_models import Generates, stock_model
from lego_kernels.hf import PreallocatedCache, accelerate

__all__ = ["measured", "one_thread"]

CASES = [("seed", "float32"), ("wide", "float32")]
MORE_CASES = [
    *(("seed", "bfloat16"), ("wide", "bfloat16")),
    *(("smol", "float32"), ("smol", "bfloat16")),
]
TOKENS = {"seed": 65, "wide": 33, "smol": 9}
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 64


class _Preallocated(Generates):
    """generate() with a fresh PreallocatedCache for every call."""

    def __call__(self, prompt: torch.Tensor, num_tokens: int) -> Any:
        capacity = len(prompt) + num_tokens
        self.options = {"past_key_values": PreallocatedCache(self.model.config, capacity=capacity)}
        return super().__call__(prompt, num_tokens)


@pytest.mark.usefixtures("one_thread")
def test_full(case: tuple[str, str], measured: Measure) -> None:
    """A token at full depth, by each cache of transformers' and by the native decoder."""
    model, num_tokens = random_model(*case, upper_kv="own"), TOKENS[case[0]]
    prompt, depth = random_prompt(model.config), model.config.num_layers
    stock = stock_model(model)
    runners: dict[str, Runner] = {
        "dynamic cache": Generates(stock, depth),
        "static cache": Generates(stock, depth, cache_implementation="static"),
        "PreallocatedCache": _Preallocated(stock, depth),
        "accelerate": Generates(accelerate(stock_model(model)), depth),
    }
    check_tokens(model, prompt, {name: run(prompt, num_tokens) for name, run in runners.items()})
    measured(lambda: {"rows": race(runners, prompt, num_tokens, over="accelerate")})


@pytest.mark.usefixtures("one_thread")
def test_speculative(request: pytest.FixtureRequest, measured: Measure, tmp_path: Path) -> None:
    """Whole calls on real prompts: stock, assisted by its own first layers, and accelerated."""
    if (run := request.config.getoption("--run")) is None:
        pytest.skip("needs --run FOLDER, of `lego run --model.upper-kv own`")
    export_checkpoint(Export(run=Path(run), out=tmp_path / "hf"), Console(quiet=True))
    stock, twin = (AutoModelForCausalLM.from_pretrained(tmp_path / "hf") for _ in range(2))
    # all of a call's tokens are wanted
    for model in (stock, twin):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    prompts = prompt_windows(RunFolder(Path(run)).corpus().validation, NUM_PROMPTS, PROMPT_TOKENS)
    calls: dict[str, tuple[Any, dict[str, int]]] = {
        "generate": (stock, {}),
        "accelerate, full": (accelerate(twin), {}),
    }
    depth = stock.config.num_hidden_layers
    for layer in (depth // 4, depth // 2, 3 * depth // 4):
        fast = accelerate(twin, mode="speculative", exit_layer=layer)
        calls[f"assistant_early_exit={layer}"] = stock, {"assistant_early_exit": layer}
        calls[f"speculative, exit_layer={layer}"] = fast, {}

    def generated(name: str) -> list[list[int]]:
        model, options = calls[name]
        with torch.inference_mode():
            return [
                model.generate(
                    prompt[None],
                    attention_mask=torch.ones_like(prompt)[None],
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    **options,
                )[0].tolist()
                for prompt in prompts
            ]

    def seconds(name: str) -> float:
        start = perf_counter()
        generated(name)
        return (perf_counter() - start) / (NUM_PROMPTS * NEW_TOKENS)

    expected = generated("generate")
    for name in calls:
        assert generated(name) == expected, name

    def work() -> dict[str, Any]:
        taken = paired_seconds(
            {name: lambda name=name: seconds(name) for name in calls}, num_rounds=ROUNDS
        )
        rows = []
        for name, each in taken.items():
            ratio = ratio_spread(taken["generate"], each)
            rows.append(
                {
                    "variant": name,
                    "ms": milliseconds(each),
                    "speedup_over_generate": [ratio.median, ratio.low, ratio.high],
                }
            )
        return {"run": Path(run).name, "rows": rows}

    measured(work)
