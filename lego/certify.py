"""`lego calibrate`: measure a run's risks, certify a threshold, and use it by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lego.certificate import (
    FILE_NAME,
    Certificate,
    Risk,
    check_levels,
    hash_ids,
    hash_model,
    learn_then_test,
    load_certificate,
    save_certificate,
    sequences_needed,
    smallest_epsilon,
)
from lego.checkpoint import Checkpoint, load_checkpoint
from lego.config import Criterion, ExperimentConfig, KVPolicy
from lego.environment import environment
from lego.generation import Engine, EngineName, ReferenceEngine
from lego.model import LegoModel
from lego.run_folder import RunFolder
from lego.sequence_risk import (
    Advance,
    DrawnSequences,
    SequenceRisks,
    default_grid,
    disagreement,
    draw_sequences,
    excess_loss,
)
from lego.strategies import EarlyExit

logger = logging.getLogger(__name__)

# what a certificate takes over from the options
_PROMISED = (
    *("risk", "epsilon", "delta", "num_sequences"),
    *("criterion", "kv_policy", "prompt_tokens", "max_new_tokens", "loss_bound"),
)


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Certify a threshold: with probability 1 - delta, the mean risk is at most epsilon.

    Prompts come from the calibration split. Exit code 1 if no threshold of the grid can be
    certified.

    Attributes:
        run: Folder of the run.
        epsilon: Largest mean risk to accept, in (0, 1).
        risk: disagreement is the share of generated tokens that full depth would have chosen
            otherwise; loss is the loss of early exit minus that of full depth, on true text, as a
            share of loss_bound.
        loss_bound: Nats a token that are a risk of 1, to which larger losses are clipped; the log
            of the vocabulary size if None. loss alone.
        delta: Largest probability, over the draw of the sequences, that the promise is wrong.
        criterion: Confidence measure; the run's own if None.
        kv_policy: What an exited token leaves in the upper caches; the run's own if None.
        prompt_tokens: Length of each prompt; as the run was timed with if None.
        max_new_tokens: Tokens after each prompt; `lego generate` may use fewer, but not more.
        num_sequences: Prompts to measure.
        grid: Thresholds to test, chosen before any risk was seen; if there are none, those that 1,
            2, 5, 10, 15, ... 100 % of training tokens reach.
        engine: Generates the tokens of disagreement: native on the CPU kernels, reference on plain
            PyTorch, auto on the native one where it can.
        json: Print JSON to stdout and nothing else.
    """

    run: tyro.conf.Positional[Path]
    epsilon: float
    risk: Risk = "disagreement"
    loss_bound: float | None = None
    delta: float = 0.05
    criterion: Criterion | None = None
    kv_policy: KVPolicy | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int = 64
    num_sequences: int = 500
    grid: tuple[float, ...] = ()
    engine: EngineName = "auto"
    json: bool = False


def calibrate(options: Calibrate, console: Console) -> dict[str, Any]:
    """`lego calibrate`: the certificate, saved beside the model; threshold None if none passed.

    Raises: ValueError, before anything is measured or written, for options that cannot work.
    """
    _check(options)
    folder = RunFolder(options.run)
    model_sha256, checkpoint = hash_model(folder.checkpoint), load_checkpoint(folder.checkpoint)
    corpus = folder.corpus()
    options = _resolved(options, folder.config(), checkpoint.model, corpus.train.ids)
    ids = corpus.calibration.ids
    drawn = _draw(options, ids, checkpoint.tokenizer.end_of_text_id)
    with _progress(console, len(options.grid) * options.num_sequences) as advance:
        risks, engine = _measure(options, checkpoint, drawn.ids, advance)
    threshold, grid = learn_then_test(
        options.grid, risks.risk, risks.shallow_ratio, epsilon=options.epsilon, delta=options.delta
    )
    certificate = Certificate(
        **{name: getattr(options, name) for name in _PROMISED},
        threshold=threshold,
        grid=grid,
        num_documents=drawn.num_documents,
        engine=engine,
        model_sha256=model_sha256,
        data_sha256=hash_ids(ids),
        environment=environment() | {"scipy": version("scipy")},
    )
    replaced = (folder.checkpoint / FILE_NAME).exists()
    save_certificate(folder.checkpoint, certificate)
    _print_certificate(console, certificate, options.run, replaced)
    return asdict(certificate)


def certified_exit(
    folder: Path,
    *,
    criterion: Criterion | None,
    kv_policy: KVPolicy | None,
    max_new_tokens: int,
    temperature: float,
) -> EarlyExit:
    """The strategy that the certificate of a checkpoint folder was made for.

    criterion and kv_policy are the certificate's if None. More tokens than certified are refused:
    nothing was measured there, and text of the model's own making takes over from the prompt. Fewer
    are the beginning of what was measured: they hold no more disagreements, but their mean may be
    higher, which a warning says.
    Raises: ValueError for what load_certificate refuses, or if something contradicts it.
    """
    certificate = load_certificate(folder)
    for name, given in (("criterion", criterion), ("kv-policy", kv_policy)):
        wanted = getattr(certificate, name.replace("-", "_"))
        if given not in (None, wanted):
            raise ValueError(
                f"generate: --{name} must be {wanted}, which --threshold certified is for, "
                f"got {given}; leave it out, or run `lego calibrate` with it"
            )
    if max_new_tokens > certificate.max_new_tokens:
        raise ValueError(
            f"generate: --max-new-tokens must be <= {certificate.max_new_tokens}, the length that "
            f"--threshold certified is for, got {max_new_tokens}; run `lego calibrate` with it"
        )
    if temperature != 0:
        raise ValueError(
            "generate: --temperature must be 0, since --threshold certified is for greedy "
            f"generation, got {temperature}"
        )
    if max_new_tokens < certificate.max_new_tokens:
        logger.warning(
            "generate: --threshold certified is for the mean over %d new tokens; that over the "
            "first %d may be higher",
            certificate.max_new_tokens,
            max_new_tokens,
        )
    assert certificate.threshold is not None
    return EarlyExit(
        threshold=certificate.threshold,
        criterion=certificate.criterion,
        kv_policy=certificate.kv_policy,
    )


def _check(options: Calibrate) -> None:
    """Raise ValueError for what can be told without the run."""
    check_levels(options.epsilon, options.delta)
    for name in ("max_new_tokens", "prompt_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"calibrate: {name} must be >= 1, got {value}")
    if not all(math.isfinite(value) for value in options.grid):
        raise ValueError(f"calibrate: grid must hold finite thresholds, got {options.grid}")
    if options.risk == "loss" and options.engine == "native":
        raise ValueError("calibrate: --engine native must come with disagreement, got loss")
    if options.loss_bound is not None and options.risk != "loss":
        raise ValueError(f"calibrate: --loss-bound must come with loss, got {options.risk}")
    if options.loss_bound is not None and not 0 < options.loss_bound < math.inf:
        raise ValueError(f"calibrate: loss_bound must be positive, got {options.loss_bound}")
    needed = sequences_needed(options.epsilon, options.delta)
    if options.num_sequences < needed:
        raise ValueError(
            f"calibrate: num_sequences must be >= {needed} for epsilon={options.epsilon} and "
            f"delta={options.delta}, or not even a threshold without any risk can pass, got "
            f"{options.num_sequences}; raise it, epsilon or delta"
        )


def _resolved(
    options: Calibrate, config: ExperimentConfig, model: LegoModel, train_ids: np.ndarray
) -> Calibrate:
    """The options with nothing left to the run: no None, and a grid that descends."""
    strategy = EarlyExit(
        threshold=math.inf,
        criterion=options.criterion or config.exit.criterion,
        kv_policy=options.kv_policy or config.exit.kv_policy,
    )
    prompt_tokens = options.prompt_tokens or config.timing.prompt_tokens
    longest = model.config.max_seq_len
    if prompt_tokens + options.max_new_tokens > longest:
        raise ValueError(
            f"calibrate: prompt_tokens and max_new_tokens must fit max_seq_len={longest}, "
            f"got {prompt_tokens} + {options.max_new_tokens}"
        )
    policy, log_V = strategy.policy_for(model), math.log(model.config.vocab_size)
    grid = options.grid or default_grid(model, train_ids, config.train.seq_len, strategy.criterion)
    return replace(
        options,
        criterion=strategy.criterion,
        kv_policy=policy,
        prompt_tokens=prompt_tokens,
        loss_bound=options.loss_bound or log_V if options.risk == "loss" else None,
        grid=tuple(sorted(set(grid), reverse=True)),
    )


def _draw(options: Calibrate, ids: np.ndarray, end_of_text_id: int) -> DrawnSequences:
    assert options.prompt_tokens is not None
    # true text after the prompt is needed to be scored, not to be generated
    scored = options.max_new_tokens if options.risk == "loss" else 0
    length = options.prompt_tokens + scored
    return draw_sequences(ids, end_of_text_id, options.num_sequences, length)


def _measure(
    options: Calibrate, checkpoint: Checkpoint, ids_NL: Tensor, advance: Advance
) -> tuple[SequenceRisks, str]:
    """The risks at every threshold of the grid, and the engine that they were measured with."""
    model, prompt_tokens = checkpoint.model, options.prompt_tokens
    assert prompt_tokens is not None and options.criterion is not None
    strategy = EarlyExit(
        threshold=math.inf, criterion=options.criterion, kv_policy=options.kv_policy
    )
    if options.loss_bound is not None:
        risks = excess_loss(
            model,
            ids_NL,
            prompt_tokens,
            strategy,
            options.grid,
            bound=options.loss_bound,
            advance=advance,
        )
        return risks, "reference"
    engine: Engine = ReferenceEngine(model)
    if options.engine != "reference":
        from lego.engine import engine_for

        engine = engine_for(model, strategy, options.engine)
    risks = disagreement(
        model,
        ids_NL,
        options.max_new_tokens,
        strategy,
        options.grid,
        engine=engine,
        stop_tokens=[checkpoint.tokenizer.end_of_text_id],
        advance=advance,
    )
    return risks, "reference" if isinstance(engine, ReferenceEngine) else "native"


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("sequences, each threshold anew"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:>6}/{task.total}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _print_certificate(
    console: Console, certificate: Certificate, run: Path, replaced: bool
) -> None:
    console.print(_table(certificate))
    if certificate.threshold is None:
        lines = _advice(certificate)
        lines += [f"The older certificate of {run} was removed."] * replaced
    else:
        lines = promise(certificate)
        use = f"--threshold certified --max-new-tokens {certificate.max_new_tokens}"
        lines.append(f"Use it: lego generate {run} {use} --prompt TEXT")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _table(certificate: Certificate) -> Table:
    what = f"{certificate.num_sequences} sequences from {certificate.num_documents} documents"
    table = Table(
        title=f"Risk ({certificate.risk}) by threshold of {certificate.criterion}: {what}",
        title_justify="left",
        title_style="bold",
    )
    for column in ("threshold", "shallow ratio", "mean risk", "p-value", "passes"):
        table.add_column(column, justify="right")
    verdict = "yes"
    for entry in certificate.grid:
        if verdict != "yes":
            verdict = "not tested"  # the first failure ends it
        elif entry.p_value > certificate.delta:
            verdict = "no"
        table.add_row(
            f"{entry.threshold:.4g}",
            f"{100 * entry.shallow_ratio:.1f} %",
            f"{entry.mean_risk:.4f}",
            f"{entry.p_value:.3g}",
            verdict,
        )
    return table


def promise(certificate: Certificate) -> list[str]:
    """What a certificate promises, in sentences."""
    found = certificate.certified
    if certificate.loss_bound is None:
        share = f"{100 * certificate.epsilon:g} %"
        what = f"at most {share} of the generated tokens differ from what full depth would choose"
    else:
        nats = certificate.epsilon * certificate.loss_bound
        what = f"early exit loses at most {nats:.3g} nats a token against full depth"
    lines = [
        f"Certified: {certificate.criterion} >= {found.threshold:.4g}, at which "
        f"{100 * found.shallow_ratio:.1f} % of the tokens exit.",
        f"With probability {1 - certificate.delta:g} over the draw of the sequences, {what}, on "
        f"average over prompts of {certificate.prompt_tokens} tokens drawn like these, with "
        f"{certificate.max_new_tokens} tokens after each.",
    ]
    if certificate.num_documents < certificate.num_sequences:
        lines.append(
            f"The sequences share {certificate.num_documents} documents: the promise is for "
            "prompts from this text; for new documents it holds as far as these stand for them."
        )
    return lines


def _advice(certificate: Certificate) -> list[str]:
    """What could be done, in sentences, when no threshold passed."""
    first, epsilon, delta = certificate.grid[0], certificate.epsilon, certificate.delta
    n = certificate.num_sequences
    would = math.ceil(1e4 * smallest_epsilon(first.mean_risk, n, delta)) / 1e4
    lines = [
        f"No threshold can be certified: at {first.threshold:.4g}, the safest, the mean risk is "
        f"{first.mean_risk:.4f} and the p-value {first.p_value:.2g}, which must be <= {delta:g}."
    ]
    if would < 1:
        lines.append(f"It would pass from --epsilon {would:g} on.")
    if first.mean_risk < epsilon:
        needed = sequences_needed(epsilon, delta, first.mean_risk)
        lines.append(f"At this mean risk it would pass with --num-sequences {needed}.")
    else:
        lines.append("More sequences alone will not help: try a safer threshold in --grid.")
    needed = sequences_needed(epsilon, delta)
    lines.append(f"A threshold without any risk passes from --num-sequences {needed} on.")
    return lines
