"""transformers models: generate() of their own against accelerate(), one thread, one row, greedy.

Tokens are compared first. test_full takes random weights; test_speculative a run that `lego run`
trained with upper_kv="own", named by --run, in float32 and cast to bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from benchmarks.decode_cases import Run, Runner, random_model, random_prompt
from benchmarks.races import ROUNDS, check_alike, check_tokens, race
from benchmarks.tables import Measure, measured, milliseconds, one_thread
from lego.checkpoint import load_checkpoint
from lego.hf_checkpoint import Export, export_checkpoint
from lego.run_folder import RunFolder
from lego.timed_generation import prompt_windows
from lego.timing import paired_seconds, ratio_spread

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

from transformers import AutoModelForCausalLM, CompileConfig, LlamaForCausalLM

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


def _compiled(stock: LlamaForCausalLM, prompt: torch.Tensor, num_tokens: int) -> Runner | str:
    """generate() with a static cache, its forward compiled for all but the prompt and warm; or why
    it does not compile."""
    options = CompileConfig(mode="default", dynamic=False, fullgraph=True)
    options._compile_all_devices = True  # by itself transformers compiles on accelerators alone
    run = Generates(
        stock,
        stock.config.num_hidden_layers,
        cache_implementation="static",
        compile_config=options,
    )
    # graphs of other models count towards the limit of recompilations
    torch.compiler.reset()
    try:
        run(prompt, num_tokens)
    except (TorchDynamoException, InductorError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return run


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
    }
    failed = []
    if isinstance(compiled := _compiled(stock_model(model), prompt, num_tokens), str):
        failed = [{"variant": "static cache, compiled", "failed": compiled}]
    else:
        runners["static cache, compiled"] = compiled
    runners["accelerate"] = Generates(accelerate(stock_model(model)), depth)
    check_tokens(model, prompt, {name: run(prompt, num_tokens) for name, run in runners.items()})
    measured(lambda: {"rows": race(runners, prompt, num_tokens, over="accelerate") + failed})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculative(
    request: pytest.FixtureRequest, measured: Measure, tmp_path: Path, dtype: str
) -> None:
    """Whole calls on real prompts: stock, assisted by its own first layers, and accelerated."""
    if (run := request.config.getoption("--run")) is None:
        pytest.skip("needs --run FOLDER, of `lego run --model.upper-kv own`")
    export_checkpoint(Export(run=Path(run), out=tmp_path / "hf"), Console(quiet=True))
    stock, twin = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype) for _ in range(2)
    )
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

    trained = load_checkpoint(Path(run) / "checkpoint").model.to(stock.dtype).requires_grad_(False)
    made = {name: generated(name) for name in calls}
    for index, prompt in enumerate(prompts):
        new = {name: each[index][PROMPT_TOKENS:] for name, each in made.items()}
        runs = {name: Run(ids, [depth] * NEW_TOKENS, 0.0) for name, ids in new.items()}
        # by itself a small model comes to repeat itself
        check_alike(trained, prompt, runs)

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
        distinct = [len({*ids[PROMPT_TOKENS:]}) for ids in made["generate"]]
        return {"run": Path(run).name, "distinct_tokens": distinct, "rows": rows}

    measured(work)
