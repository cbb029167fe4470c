"""The text that ends a run: what the trained model makes of validation text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lego.checkpoint import Checkpoint
from lego.config import ExperimentConfig
from lego.data import Corpus
from lego.generation import GeneratedToken, generate
from lego.sampling import Sampling
from lego.strategies import EarlyExit
from lego.timed_generation import prompt_windows

_NUM_TOKENS = 96
SAMPLING = Sampling(temperature=0.7, top_p=0.95, seed=1)


def sample_run(
    checkpoint: Checkpoint, corpus: Corpus, config: ExperimentConfig, results: Mapping[str, Any]
) -> tuple[list[int], list[GeneratedToken]]:
    """A prompt of the validation split and its sampled continuation, by the run's threshold.

    results holds threshold, criterion and kv_policy. The same run gives the same tokens each time.
    """
    (prompt,) = prompt_windows(corpus.validation, 1, config.timing.prompt_tokens)
    num_tokens = min(_NUM_TOKENS, checkpoint.model.config.max_seq_len - len(prompt))
    strategy = EarlyExit(
        threshold=results["threshold"],
        criterion=results["criterion"],
        kv_policy=results["kv_policy"],
    )
    new: list[GeneratedToken] = []
    model = checkpoint.model
    generate(model, [prompt], num_tokens, strategy, sampling=SAMPLING, streamer=new.append)
    return prompt.tolist(), new
