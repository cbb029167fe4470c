"""The `lego` command: arguments in, exit code out.

Results go to stdout, progress to stderr under --json. A mistake of the user's, or of the disk's, is
one line on stderr and exit code 2. Where no threshold can be certified, `calibrate` returns 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from lego import certify, commands
from lego.certify import Calibrate
from lego.commands import Generate
from lego.config import PRESETS, ExperimentConfig
from lego.doctor import diagnose, print_diagnosis
from lego.files import to_json
from lego.frontier import FrontierOptions
from lego.frontier_command import evaluate_frontier
from lego.hf_checkpoint import Export, Import, export_checkpoint, import_checkpoint
from lego.report.page import Report, write_report

Preset = Literal["quick", "seed", "wide"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train both phases and both dense baselines, evaluate, generate, time, and print it all.

    Attributes:
        preset: What every option below starts from.
        out: Folder of the run, runs/PRESET by default. A run that was cut off goes on.
        json: Print results.json to stdout and nothing else.
        threads: CPU threads to train with; 0 leaves the choice to torch.
    """

    preset: Preset = "quick"
    out: Path | None = None
    json: bool = False
    threads: int = 0
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(
        default_factory=ExperimentConfig
    )

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"--threads: must be >= 0, got {self.threads}")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.preset


@dataclass(frozen=True, kw_only=True)
class Train(Run):
    """Train and calibrate a model alone; `lego run` with the same options goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a trained run on its validation split.

    Attributes:
        run: Folder of the run.
        json: Print JSON to stdout and nothing else.
        shallow_ratio: Share of the calibration tokens that shall exit; as in training if None.
        frontier: Measure quality, cost and time of every criterion and KV policy at some shallow
            ratios, beside the dense baselines: minutes. Writes frontier.json and frontier.svg.
        ratios: The shallow ratios of --frontier.
        risks: Shares of calibration tokens that may leave with another token than full depth's:
            --frontier compares the criteria there.
        windows: Validation windows that --frontier scores; its intervals are over windows.
    """

    run: tyro.conf.Positional[Path]
    json: bool = False
    shallow_ratio: float | None = None
    frontier: bool = False
    ratios: tuple[float, ...] = FrontierOptions().ratios
    risks: tuple[float, ...] = FrontierOptions().risks
    windows: int = FrontierOptions().num_windows


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, the native build, the backend of each op with a live self-test, and repairs.

    Attributes:
        json: Print JSON to stdout and nothing else.
    """

    json: bool = False


Command = Run | Train | Evaluate | Calibrate | Generate | Export | Import | Report | Doctor


def run_command(args: Sequence[str] | None = None) -> int:
    """Parse the arguments (sys.argv by default), run the command and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        return _run(_parse(args))
    except BrokenPipeError:
        # whoever read our output has seen enough; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        # rich would wrap the line and colour parts of it
        print(f"lego: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lego: interrupted; `run` and `train` go on from their last save", file=sys.stderr)
        return 130


def _parse(args: list[str]) -> Command:
    start = _preset(args)
    config = PRESETS.get(start, PRESETS["quick"])
    run = Run(config=config)
    commands_ = (
        Annotated[Run, tyro.conf.subcommand("run", default=run)]
        | Annotated[Train, tyro.conf.subcommand("train", default=Train(config=config))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    )
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(
        commands_,
        prog="lego",
        args=args,
        description="Layer-wise early exit for transformer language models.",
        config=options,
    )


def _preset(args: list[str]) -> str:
    """The preset named in args, before they are parsed: it sets the defaults of the others."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        if option == "--preset":
            return value
        if option.startswith("--preset="):
            return option.partition("=")[2]
    return "quick"


def _evaluate(command: Evaluate, console: Console) -> dict[str, Any]:
    options = FrontierOptions(
        ratios=command.ratios, risks=command.risks, num_windows=command.windows
    )
    if not command.frontier:
        if options != FrontierOptions():
            raise ValueError(
                "evaluate: --ratios, --risks and --windows must come with --frontier, got none"
            )
        return commands.evaluate(command.run, command.shallow_ratio, console)
    if command.shallow_ratio is not None:
        raise ValueError("evaluate: --frontier must come with --ratios, got --shallow-ratio")
    return evaluate_frontier(command.run, options, console)


def _run(command: Command) -> int:
    if isinstance(command, Doctor):
        return print_diagnosis(diagnose(), json=command.json)
    console = Console(stderr=command.json, soft_wrap=True)
    if isinstance(command, Run):
        if command.threads:
            torch.set_num_threads(command.threads)
        if isinstance(command, Train):
            found = commands.train(command.config, command.folder, console)
        else:
            found = commands.run(command.config, command.folder, console)
    elif isinstance(command, Evaluate):
        found = _evaluate(command, console)
    elif isinstance(command, Calibrate):
        found = certify.calibrate(command, console)
    elif isinstance(command, Export):
        found = export_checkpoint(command, console)
    elif isinstance(command, Import):
        found = import_checkpoint(command, console)
    elif isinstance(command, Report):
        found = write_report(command, console)
    else:
        found = commands.generate_text(command, console)
    if command.json:
        print(to_json(found), end="")
    return int(isinstance(command, Calibrate) and found["threshold"] is None)
