"""`lego report`: one self-contained page about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import tyro
from rich.console import Console

from lego.checkpoint import load_checkpoint
from lego.config import PRESETS, ExperimentConfig
from lego.evaluation import score_tokens
from lego.files import write_text
from lego.report import figures
from lego.report.benchmarks import BenchmarkFile, read_benchmarks
from lego.report.cells import Cell, Row, Table, plain
from lego.report.certificate import CertificateSection, certificate_section
from lego.report.confidence import Confidence, confidence
from lego.report.exit_map import ExitMap, exit_map
from lego.report.experiments import generation_tables, no_native_engine, training_tables
from lego.report.frontier import FrontierSection, frontier_section
from lego.report.summary import Measured, Summary, baseline_table, measured, summarise
from lego.run_folder import RunFolder
from lego.sample import SAMPLING, sample_run


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one self-contained HTML page about trained runs.

    Attributes:
        runs: Folders of finished runs.
        benchmarks: JSON files of pytest-benchmark, to be shown as tables.
        out: The page.
        json: Print what was written, as JSON, to stdout and nothing else.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    benchmarks: tuple[Path, ...] = ()
    out: Path = Path("report.html")
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Both experiments by one kind of upper K/V; a run may have compared two."""

    name: str
    training: list[Table]
    generation: list[Table]
    no_native_engine: str
    measured: list[Measured]
    savings: figures.Savings | None


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """All that the page says about a run; absent maps a section to why it is not there."""

    name: str
    path: str
    config: ExperimentConfig
    results: dict[str, Any]
    summary: Summary
    baselines: Table
    baselines_figure: figures.Scatter | None
    variants: list[Variant]
    environment: Table
    frontier: FrontierSection | None = None
    certificate: CertificateSection | None = None
    confidence: list[Confidence]
    exit_map: ExitMap | None = None
    absent: dict[str, str]


def write_report(options: Report, console: Console) -> dict[str, Any]:
    """`lego report`: read everything first, then write the page.

    Raises: ValueError, before anything is written, if there is no run, a folder is not that of a
    finished one, a benchmarks file is not one or there is no folder to write to.
    """
    if not options.runs:
        raise ValueError("report: at least one run folder must be given, got none")
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"report: --out must be a file in a folder that exists, got {options.out}")
    finished = [_finished(RunFolder(path)) for path in options.runs]
    files = [read_benchmarks(path) for path in options.benchmarks]
    pages = [_run_page(folder, results) for folder, results in finished]
    for page in pages:
        for reason in page.absent.values():
            console.print(f"{page.path}: {reason}", highlight=False, markup=False)
    write_text(options.out, render(pages, files))
    console.print(f"The report is {options.out}", highlight=False, markup=False)
    return {
        "report": str(options.out),
        "runs": [page.path for page in pages],
        "absent": {page.path: page.absent for page in pages},
    }


def render(pages: Sequence[RunPage], files: Sequence[BenchmarkFile]) -> str:
    """The page as HTML; text of the runs is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lego.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    overview = _overview(pages) if len(pages) > 1 else None
    values = {"runs": pages, "files": files, "overview": overview}
    return template.render(values, figures=figures, sampling=SAMPLING) + "\n"


def _overview(pages: Sequence[RunPage]) -> Table:
    """What stands at the top of each run, side by side."""
    rows: list[Row] = []
    for page in pages:
        cells = [cell for _, cell, _ in page.summary.tiles]
        cells.append(Cell(page.summary.verdict, words=True))
        rows.append((page.path, *cells))
    return Table(
        caption="The runs side by side",
        columns=("run", *(name for name, _, _ in pages[0].summary.tiles), "verdict"),
        rows=rows,
        note="Layers, bytes and time saved in generation; perplexity against full depth.",
    )


def _finished(folder: RunFolder) -> tuple[RunFolder, dict[str, Any]]:
    folder.config()  # says that this is no run folder, where it is none
    results = folder.results()
    if results is None:
        remedy = "finish it with the `lego run` command that began it"
        raise ValueError(f"report: {folder.path} must hold results.json, got none; {remedy}")
    for key in ("experiment_001", "criteria", "criterion", "threshold", "kv_policy"):
        if results.get(key) is None:
            raise ValueError(
                f"report: {folder.path / 'results.json'} must be as `lego run` wrote it, got no "
                f"{key}; repeat the run in another folder"
            )
    return folder, results


def _run_page(folder: RunFolder, results: dict[str, Any]) -> RunPage:
    config = folder.config()
    absent: dict[str, str] = {}
    page = RunPage(
        name=folder.path.resolve().name,
        path=str(folder.path),
        config=config,
        results=results,
        summary=summarise(results),
        baselines=baseline_table(results),
        baselines_figure=figures.scatter(figures.baseline_points(results)),
        variants=_variants(config, results),
        environment=_environment(results),
        confidence=[],
        absent=absent,
    )
    try:
        page = replace(page, frontier=frontier_section(folder.path / "frontier.json"))
    except ValueError as error:
        absent["frontier"] = str(error)
    try:
        page = replace(page, certificate=certificate_section(folder.checkpoint))
    except ValueError as error:
        absent["certificate"] = str(error)
    try:
        return _with_model(page, folder)
    except (ValueError, OSError) as error:
        # results outlive the text and the weights that they came from
        absent["model"] = str(error)
        return page


def _variants(config: ExperimentConfig, results: dict[str, Any]) -> list[Variant]:
    like_source = config.model == PRESETS["seed"].model
    variants = []
    for found in (results, results.get("comparison")):
        if not isinstance(found, dict):
            continue
        variants.append(
            Variant(
                name=f"upper K/V {found.get('upper_kv')}, policy {found.get('kv_policy')}",
                training=training_tables(found, with_source=like_source),
                generation=generation_tables(found, with_source=like_source),
                no_native_engine=no_native_engine(found),
                measured=measured(found),
                savings=figures.savings(measured(found)),
            )
        )
    return variants


def _with_model(page: RunPage, folder: RunFolder) -> RunPage:
    """What is not in results.json: the confidence of every validation token, and a sample."""
    checkpoint, corpus, results = load_checkpoint(folder.checkpoint), folder.corpus(), page.results
    model = checkpoint.model.config
    scores = score_tokens(checkpoint.model, corpus.validation, page.config.train.seq_len)
    prompt, tokens = sample_run(checkpoint, corpus, page.config, results)
    criteria = dict.fromkeys((results["criterion"], results.get("compared_by", "gate")))
    return replace(
        page,
        confidence=[
            confidence(scores, name, results["criteria"][name]["threshold"]) for name in criteria
        ],
        exit_map=exit_map(
            checkpoint.tokenizer,
            prompt,
            tokens,
            exit_layer=model.exit_layer,
            num_layers=model.num_layers,
        ),
    )


def _environment(results: dict[str, Any]) -> Table:
    """Machine, versions and command of the run, then its text."""
    entries = {**results.get("environment", {})}
    for key, value in results.get("data", {}).items():
        entries[f"text: {key.replace('_', ' ')}"] = value
    rows = [(key.replace("_", " "), plain(value)) for key, value in entries.items()]
    return Table(caption="What it was measured on", columns=("entry", "value"), rows=rows)
