"""What each command does, for the command line and for programs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from lego.calibration import calibrate_by_quantile
from lego.certify import certified_exit
from lego.checkpoint import Checkpoint, checkpoint_folder, load_checkpoint
from lego.config import Criterion, ExitConfig, ExperimentConfig, KVPolicy
from lego.controller import Controller, Held
from lego.data import Corpus
from lego.environment import environment
from lego.evaluation import quality, score_tokens
from lego.experiment import Outcome, load_corpus, run_experiment, train_checkpoint, two_stage
from lego.files import write_text
from lego.generation import Engine, EngineName, GeneratedToken, ReferenceEngine, generate
from lego.plots import save_plots
from lego.run_folder import RunFolder
from lego.sample import sample_run
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative, Strategy, Uncached
from lego.terminal import ShadedText, TrainingDisplay, legend, print_evaluation, print_results


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a trained run.

    Attributes:
        run: Folder of the run, or of an imported checkpoint.
        prompt: Text to continue.
        mode: early-exit decides per token, full runs all layers, speculative gives the same tokens
            from drafts of the lower layers, uncached also recomputes the past.
        max_new_tokens: Tokens to generate at most; the end-of-text token stops earlier.
        criterion: Confidence measure of early-exit and speculative; the run's own if None.
        threshold: Exit at this confidence or above; the one that reaches the run's shallow ratio
            if None; `certified` is that of `lego calibrate`, for greedy early-exit.
        hold_shallow_ratio: Move the threshold after every token of early-exit, so that this share
            exits; it starts at `threshold`.
        hold_disagreement: The same for the share of tokens that are not full depth's, estimated by
            running the upper block on a tenth of the exits.
        kv_policy: What an exited token leaves in the upper caches; the run's own if None.
        draft_tokens: Tokens that speculative drafts at most before it verifies them.
        stop_confidence: speculative drafts no further below this confidence.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this probability.
        seed: Of the sampling.
        engine: native runs on the CPU kernels, reference on plain PyTorch, auto on the native one
            where it can; the tokens are the same but for rounding.
        stream: Print every token as it comes.
        show_exits: Colour every token by the layer it left at.
        json: Print JSON to stdout and nothing else.
    """

    run: tyro.conf.Positional[Path]
    prompt: str
    mode: Literal["early-exit", "full", "speculative", "uncached"] = "early-exit"
    max_new_tokens: int = 64
    criterion: Criterion | None = None
    threshold: float | Literal["certified"] | None = None
    hold_shallow_ratio: float | None = None
    hold_disagreement: float | None = None
    kv_policy: KVPolicy | None = None
    draft_tokens: int = 4
    stop_confidence: float = 0.5
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    engine: EngineName = "auto"
    stream: bool = False
    show_exits: bool = False
    json: bool = False


def run(config: ExperimentConfig, path: Path, console: Console) -> dict[str, Any]:
    """`lego run`: the whole experiment; resumes, or prints the results of a run that is done."""
    config = replace(config, data=config.data.resolved())
    folder, corpus = RunFolder(path), load_corpus(config)
    folder.claim(config, corpus.sha256)
    results = folder.results()
    if results is not None:
        print_results(console, results)
        console.print(
            f"This run was done before; its folder is {path}", highlight=False, markup=False
        )
        return results
    machine = environment()
    console.print(
        f"{path}: {config.data.name} on {machine['cpu']}, {machine['cpu_threads']} threads",
        highlight=False,
        markup=False,
    )
    with TrainingDisplay(console, path / "events") as display:
        outcome = run_experiment(config, corpus, path, display.watch)
    results = outcome.results | {"environment": machine}
    save_plots(outcome, path)
    sample, plain_sample = _sample(outcome, corpus, config)
    write_text(path / "sample.txt", plain_sample)
    folder.write_results(results)
    print_results(console, results)
    console.rule("sample", style="dim")
    console.print(sample)
    console.print(f"Results, plots and checkpoint are in {path}", highlight=False, markup=False)
    return results


def train(config: ExperimentConfig, path: Path, console: Console) -> dict[str, Any]:
    """`lego train`: the model alone, with its threshold."""
    config = replace(config, data=config.data.resolved())
    corpus = load_corpus(config)
    RunFolder(path).claim(config, corpus.sha256)
    with TrainingDisplay(console, path / "events") as display:
        _, checkpoint = train_checkpoint(config, corpus, path, display.watch)
    console.print(f"Checkpoint is in {RunFolder(path).checkpoint}", highlight=False, markup=False)
    assert checkpoint.calibration is not None
    return {
        "checkpoint": str(RunFolder(path).checkpoint),
        "calibration": asdict(checkpoint.calibration),
    }


def evaluate(path: Path, shallow_ratio: float | None, console: Console) -> dict[str, Any]:
    """`lego evaluate`: both exits and every criterion on the run's validation split."""
    folder = RunFolder(path)
    config, corpus = folder.config(), folder.corpus()
    checkpoint, seq_len = load_checkpoint(folder.checkpoint), config.train.seq_len
    model, calibration = checkpoint.model, checkpoint.calibration
    if calibration is None or shallow_ratio is not None:
        confidence = score_tokens(model, corpus.calibration, seq_len).confidence
        ratio = 1 - config.train.hard_example_ratio if shallow_ratio is None else shallow_ratio
        calibration = calibrate_by_quantile(confidence, ratio)
    scores = score_tokens(model, corpus.validation, seq_len)
    exits = {
        "shallow": quality(scores.nll_shallow, scores.correct_shallow, corpus.validation),
        "deep": quality(scores.nll_deep, scores.correct_deep, corpus.validation),
    }
    found = {
        "exits": {name: asdict(value) for name, value in exits.items()},
        "criteria": {
            name: two_stage(model, scores, corpus.validation, name, threshold)
            for name, threshold in calibration.threshold.items()
        },
    }
    print_evaluation(console, found)
    return found


def generate_text(options: Generate, console: Console) -> dict[str, Any]:
    """`lego generate`: one continuation, with the layers that each token ran."""
    checkpoint = load_checkpoint(checkpoint_folder(options.run))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError(f"generate: prompt must hold at least one token, got {options.prompt!r}")
    shaded = ShadedText(tokenizer, model.config.num_layers, prompt)
    pieces = [Text(options.prompt, "dim")]

    def show(new: GeneratedToken) -> None:
        piece = shaded.piece(new)
        pieces.append(piece if options.show_exits else Text(piece.plain))
        if options.stream and not options.json:
            console.print(pieces[-1], end="")

    if options.stream and not options.json:
        console.print(pieces[0], end="")
    strategy = _strategy(options, checkpoint)
    controller = _controller(options, strategy)
    engine: Engine = ReferenceEngine(model)
    if options.engine != "reference":
        from lego.engine import engine_for

        engine = engine_for(model, strategy, options.engine)
    output = generate(
        model,
        [prompt],
        options.max_new_tokens,
        strategy,
        sampling=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ),
        stop_tokens=[tokenizer.end_of_text_id],
        streamer=show,
        engine=engine,
        controller=controller,
    )
    if not options.json:
        console.print(Text("") if options.stream else Text.assemble(*pieces))
    tokens, depths = output.tokens[0], output.exit_layer[0]
    shallow = sum(depth < model.config.num_layers for depth in depths)
    if options.show_exits:
        console.print(legend(model.config.exit_layer, model.config.num_layers))
        console.print(f"{shallow} of {len(depths)} tokens exited", highlight=False, markup=False)
    control = output.control[0] if output.control else None
    if controller is not None and control is not None:
        held = controller.held.replace("_", " ")
        console.print(
            f"held {held} at {control.loss:.3f} for a target of {controller.target}, by thresholds "
            f"from {control.lowest:.3f} to {control.highest:.3f}; {control.probes} probes",
            highlight=False,
        )
    return {
        "text": tokenizer.decode(tokens),
        "tokens": tokens,
        "exit_layer": depths,
        "confidence": [None if math.isnan(c) else c for c in output.confidence[0]],
        "shallow_tokens": shallow,
        "engine": "reference" if isinstance(engine, ReferenceEngine) else "native",
        "stats": asdict(output.stats),
        "control": control and asdict(control) | {"loss": control.loss},
    }


def _controller(options: Generate, strategy: Strategy) -> Controller | None:
    targets: dict[Held, float | None] = {
        "shallow_ratio": options.hold_shallow_ratio,
        "disagreement": options.hold_disagreement,
    }
    given = {held: target for held, target in targets.items() if target is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(
            "generate: one target must be held, got --hold-shallow-ratio and --hold-disagreement"
        )
    if options.threshold == "certified":
        raise ValueError("generate: a certified threshold must stay as it is, got a target to hold")
    if not isinstance(strategy, EarlyExit):
        raise ValueError(
            f"generate: a target to hold must come with early-exit, got {options.mode}"
        )
    ((held, target),) = given.items()
    start = min(max(strategy.threshold, 0.0), 1.0)
    return Controller(held=held, target=target, start=start, seed=options.seed)


def _strategy(options: Generate, checkpoint: Checkpoint) -> Strategy:
    threshold = options.threshold
    if isinstance(threshold, str):
        if options.mode != "early-exit":
            raise ValueError(
                f"generate: --threshold certified must come with early-exit, got {options.mode}"
            )
        return certified_exit(
            checkpoint_folder(options.run),
            criterion=options.criterion,
            kv_policy=options.kv_policy,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
    if options.mode == "uncached":
        return Uncached()
    if options.mode == "full":
        return FullDepth()
    exit_config = _exit_config(options.run)
    criterion = options.criterion or exit_config.criterion
    if options.mode == "speculative":
        return Speculative(
            draft_tokens=options.draft_tokens,
            stop_confidence=options.stop_confidence,
            criterion=criterion,
        )
    if threshold is None:
        calibrated = checkpoint.calibration.threshold if checkpoint.calibration else {}
        if criterion not in calibrated:
            raise ValueError(f"generate: --threshold must be given, got none for {criterion}")
        threshold = calibrated[criterion]
    return EarlyExit(
        threshold=threshold,
        criterion=criterion,
        kv_policy=options.kv_policy or exit_config.kv_policy,
    )


def _exit_config(path: Path) -> ExitConfig:
    """The run's own, also for its folder `checkpoint`; the defaults for an imported checkpoint."""
    run = RunFolder(path.parent if path.name == "checkpoint" else path)
    return run.config().exit if run.checkpoint.is_dir() else ExitConfig()


def _sample(outcome: Outcome, corpus: Corpus, config: ExperimentConfig) -> tuple[Text, str]:
    """The run's sample: shaded, and plain with deep tokens in brackets."""
    tokenizer, model_config = outcome.checkpoint.tokenizer, outcome.checkpoint.model.config
    prompt, tokens = sample_run(outcome.checkpoint, corpus, config, outcome.results)
    shaded = ShadedText(tokenizer, model_config.num_layers, prompt)
    pieces = [Text(tokenizer.decode(prompt), "dim")]
    plain = [pieces[0].plain]
    for new in tokens:
        pieces.append(piece := shaded.piece(new))
        deep = piece.plain and new.exit_layer == model_config.num_layers
        plain.append(f"[{piece.plain}]" if deep else piece.plain)
    key = legend(model_config.exit_layer, model_config.num_layers)
    return Text.assemble(*pieces, "\n", key), "".join(plain) + "\n"
