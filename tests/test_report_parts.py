"""What the report is made of: hostile texts, verdicts, figures, optional files, benchmarks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lego.certificate import load_certificate
from lego.certify import promise
from lego.cli import run_command
from lego.evaluation import TokenScores
from lego.frontier_command import frontier_verdict
from lego.generation import GeneratedToken
from lego.report import figures
from lego.report.benchmarks import read_benchmarks
from lego.report.cells import MISSING, Cell, change, dig, number, plain, significant, spread
from lego.report.certificate import certificate_section
from lego.report.confidence import NUM_BINS, confidence
from lego.report.exit_map import exit_map, printable
from lego.report.frontier import frontier_section
from lego.report.page import _run_page, render
from lego.report.summary import measured, summarise
from lego.run_folder import RunFolder
from lego.tokenizer import train_tokenizer
from tests.report_pages import Page
from tests.runs import finished_run, sentences

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NO_BREAK = "\N{NO-BREAK SPACE}"
HOSTILE = (
    "<script>alert('\"&amp;')</script>\x00\x1b[31m \n\n  \t \u00e9t\u00e9 \u202e\U0001f600 ]]>-->"
)


@pytest.fixture(scope="module")
def run_page():
    folder = RunFolder(finished_run()[0])
    return folder, folder.results()


def mapped(text, prompt="", confidence=0.5):
    """An exit map of a text, every second token of which went deep."""
    tokenizer = train_tokenizer("bpe", sentences(5), 258)
    ids = tokenizer.encode(text)
    tokens = [
        GeneratedToken(row=0, token=token, exit_layer=4 if i % 2 else 2, confidence=confidence)
        for i, token in enumerate(ids)
    ]
    return exit_map(tokenizer, tokenizer.encode(prompt), tokens, exit_layer=2, num_layers=4)


def test_texts_are_shown_and_never_run(run_page):
    """Markup, quotes, control characters and split characters: in tokens, prompt and file names."""
    found = mapped(HOSTILE, prompt=HOSTILE)
    page = _run_page(*run_page)
    page = replace(page, exit_map=found, name="<b>&run", path='a"><script>')
    read = Page(render([page], []))
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert "".join(text for text, _ in read.tokens) == printable(HOSTILE)
    assert len(read.tokens) == len(HOSTILE.encode())
    assert printable(HOSTILE) in "".join(read.texts)
    assert 'lego calibrate a"><script>' in read.text and "<b>&run" in read.text
    assert "\x00" not in "".join(read.texts) and "\x1b" not in "".join(read.texts)


def test_tokens_without_a_text_have_a_name():
    marks = mapped(" \n  \t\u00e9").marks
    assert [mark.text for mark in marks] == [" ", "\n", " ", " ", "\t", "", "\u00e9"]
    names = ["space", "line break", "space", "space", "tab", "part of a character", ""]
    assert [mark.name for mark in marks] == names
    tokenizer = train_tokenizer("bpe", "ab\n\n   cd " * 50, 300)
    ids = tokenizer.encode("\n\n   ")
    tokens = [GeneratedToken(row=0, token=i, exit_layer=2, confidence=1.0) for i in ids]
    found = exit_map(tokenizer, [], tokens, exit_layer=2, num_layers=4)
    assert [mark.name for mark in found.marks] == ["2 line breaks, 2 spaces", "space"]


def test_a_text_that_ends_within_a_character():
    tokenizer = train_tokenizer("bpe", sentences(5), 258)
    ids = tokenizer.encode("a\u00e9")[:-1]
    tokens = [GeneratedToken(row=0, token=i, exit_layer=4, confidence=math.nan) for i in ids]
    found = exit_map(tokenizer, [], tokens, exit_layer=2, num_layers=4)
    assert [(m.text, m.confidence) for m in found.marks] == [("a", None), ("", None)]
    assert found.num_shallow == 0


def comparison(*, nats, error, dense_cost, cost=0.8):
    dense = {
        "num_layers": 4,
        "val_ppl": 10.0,
        "bits_per_byte": 1.0,
        "true_cost": dense_cost,
        "lego_minus_dense_nats": nats,
        "standard_error": error,
    }
    routed = {"true_cost": cost, "routed_ppl": 10 * math.exp(nats), "bits_per_byte": 1.0}
    return {"compared_by": "gate", "criteria": {"gate": routed}, "baselines": {"dense_x": dense}}


@pytest.mark.parametrize(
    ("nats", "error", "dense_cost", "worth"),
    [
        (0.3, 0.1, 0.6, "not"),  # the dense model is better and cheaper
        (0.3, 0.1, 0.8, "not"),  # better, as dear
        (0.1, 0.1, 0.6, "not"),  # as good, cheaper
        (-0.1, None, 0.6, "not"),  # one window: nobody can tell them apart
        (0.3, 0.1, 1.0, "trade"),  # better and dearer
        (-0.3, 0.1, 0.6, "trade"),  # worse and cheaper
        (-0.3, 0.1, 1.0, "worth"),
        (0.1, 0.1, 1.0, "worth"),  # as good, dearer
    ],
)
def test_is_it_worth_it(nats, error, dense_cost, worth):
    found = summarise(comparison(nats=nats, error=error, dense_cost=dense_cost))
    assert found.worth == worth
    assert found.tiles[1][1] == Cell("not measured")
    if worth != "trade":
        numbers = [
            f"10.00 at {100 * dense_cost:.1f}{NO_BREAK}%",
            f"{10 * math.exp(nats):.2f} at 80.0",
        ]
        assert all(text in found.reason for text in numbers)
        assert found.reason.startswith("LEGO" if worth == "worth" else "a dense model")


def test_losses_are_called_losses():
    spent = {"true_cost": 1.25, "speedup": 0.8, "layer_savings": 0.3}
    results = comparison(nats=0.3, error=0.1, dense_cost=0.6) | {"criterion": "gate"}
    found = summarise(results | {"experiment_002": spent})
    wanted = (
        f"Early exit by gate spent 25.0{NO_BREAK}% more bytes and spent 25.0{NO_BREAK}% more time"
    )
    assert found.saved.startswith(wanted)
    assert [cell.value for _, cell, _ in found.tiles[:3]] == pytest.approx([0.3, -0.25, -0.25])


def test_the_native_engine_goes_first():
    both = {"experiment_002": {"speedup": 2.0}, "native_engine": {"exit": {"speedup": 4.0}}}
    results = {"criterion": "margin", "compared_by": "margin"} | both
    assert [(m.name, m.criterion) for m in measured(results)] == [
        ("reference", "margin"),
        ("native engine", "margin"),
    ]
    assert summarise(results).tiles[2][1].value == 0.75


def test_numbers_as_text():
    assert number(1234.567).text == "1,234.57" and number(-0.5).text == "\N{MINUS SIGN}0.50"
    assert number(MISSING) == Cell("not measured") and number(None) == Cell("\N{EM DASH}")
    assert number(math.inf).value is None
    assert change(2.0, 3.0) == Cell(f"+50.0{NO_BREAK}%", 0.5)
    assert change(0.0, 3.0) == change(None, 1.0) == Cell("\N{EM DASH}")
    assert spread(1.5, [1.25, 1.75]).text == "1.50\N{MULTIPLICATION SIGN} (1.25 to 1.75)"
    assert spread(1.5, MISSING).text == "1.50\N{MULTIPLICATION SIGN}"
    texts = {1.0: "1.00", 0.0307: "0.0307", 22.94: "22.9", 11023.4: "11,023", 100.2: "100"}
    assert {value: significant(value).text for value in texts} == texts
    assert plain(True) == Cell("yes") and plain(31000.5).text == "31,000"
    assert dig({"a": {"b": None}}, "a", "b") is None and dig({"a": 1}, "a", "b") is MISSING


def bars(outline):
    """(left, top, right, bottom) of every bar of an outline."""
    found = []
    for bar in filter(None, outline.split("z")):
        place, top, rest = bar.removeprefix("M").replace("H", "V").split("V", 2)
        right, bottom = rest.split("V")
        left, start = place.split()
        assert start == bottom
        found.append(tuple(map(float, (left, top, right, bottom))))
    return found


def test_histogram_holds_every_token():
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(500, generator=draw)
    values[:2] = torch.tensor([0.0, 1.0])
    right = torch.rand(500, generator=draw) < values
    nll = torch.zeros(500)
    scores = TokenScores(
        nll_shallow=nll,
        nll_deep=nll,
        correct_shallow=right,
        correct_deep=right,
        agree=right,
        confidence={"gate": values},
    )
    found = confidence(scores, "gate", 0.75)
    assert (sum(found.right), sum(found.wrong)) == (int(right.sum()), int((~right).sum()))
    assert found.exit_right == int((right & (values >= 0.75)).sum())
    assert found.exit_right == sum(found.right[30:]) and found.exit_wrong == sum(found.wrong[30:])
    drawn = figures.histogram(found)
    per_token = (figures.BOTTOM - figures.TOP) / (
        1.05 * max(map(sum, zip(found.right, found.wrong, strict=True)))
    )
    low, high = bars(drawn.right), bars(drawn.wrong)
    for shown, counts in ((low, found.right), (high, found.wrong)):
        heights = [bottom - top for _, top, _, bottom in shown]
        assert heights == pytest.approx([n * per_token for n in counts if n], abs=0.11)
    assert low[-1][2] <= figures.RIGHT and low[0][0] >= figures.LEFT
    middle = figures.LEFT + 0.75 * (figures.RIGHT - figures.LEFT)
    assert drawn.threshold == pytest.approx(middle, abs=0.1)
    assert figures.histogram(confidence(scores, "gate", None)).threshold is None
    assert confidence(scores, "gate", None).exit_right == 0
    assert len(found.right) == NUM_BINS


def test_dense_model_with_lower_bits_is_drawn_lower():
    lines = {
        "dense, 2 layers": [figures.Point(0.6, 2.0)],
        "gate": [figures.Point(0.8, 2.2, None, (2.1, 2.3)), figures.Point(1.0, 2.1)],
    }
    drawn = figures.scatter(lines)
    dense, gate = drawn.series
    assert dense.marks[0].x < gate.marks[0].x < gate.marks[1].x
    assert dense.marks[0].y > gate.marks[1].y > gate.marks[0].y
    assert gate.marks[0].y_range[0] > gate.marks[0].y > gate.marks[0].y_range[1]
    assert (dense.label, gate.label) == ("dense, 2 layers", "") and dense.style == "dense"
    assert gate.line.count("L") == 1 and dense.line == ""
    assert figures.scatter({}) is None
    only = figures.scatter({"gate": [figures.Point(0.8, 2.2)]})
    assert figures.LEFT < only.series[0].marks[0].x < figures.RIGHT


def test_savings_are_drawn_where_they_were_measured():
    found = {"true_cost": 0.5, "speedup": 1.5, "speedup_quartiles": [1.25, 1.75]}
    results = {"criterion": "max_prob", "experiment_002": found, "experiment_002_gate": {}}
    drawn = figures.savings(measured(results))
    (row,) = drawn.rows
    assert drawn.base < row.quartiles[0] < row.measured < row.quartiles[1] < row.ideal
    # 1, 1.5 and 2 are evenly spaced
    assert row.ideal - row.measured == pytest.approx(row.measured - drawn.base, abs=0.2)
    assert figures.savings([]) is None


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """(folder, page) of a run with a frontier and a certificate."""
    folder = Path(shutil.copytree(finished_run()[0], tmp_path_factory.mktemp("measured") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(finished_run()[2]))
        frontier = ("--frontier", "--windows", "5", "--ratios", "0", "0.5", "--risks", "0.5")
        assert run_command(["evaluate", str(folder), *frontier]) == 0
        levels = ("--epsilon", "0.5", "--delta", "0.2", "--num-sequences", "30")
        grid = ("--max-new-tokens", "6", "--grid", "0.05", "0.012")
        assert run_command(["calibrate", str(folder), *levels, *grid]) == 0
        run_page = _run_page(RunFolder(folder), RunFolder(folder).results())
    return folder, Page(render([run_page], []))


def rows_of(page, caption):
    """(row heading, cells) of the only table of that caption."""
    ((_, *rows),) = page.tables[caption]
    return [(name, cells) for (name, _), *cells in rows]


def test_frontier(measured_run):
    """Every setting, criterion and break-even ratio of frontier.json, as it is there."""
    folder, page = measured_run
    found = json.loads((folder / "frontier.json").read_text())
    rows = rows_of(page, "Every setting of the frontier")
    assert len(rows) == len(found["settings"]) == 12
    for (name, cells), setting in zip(rows, found["settings"], strict=True):
        assert name == setting["criterion"] and cells[0][0] == setting["kv_policy"]
        wanted = (
            *(setting[key] for key in ("risk", "shallow_ratio", "bits_per_byte", "agreement")),
            *(setting["generation"][k] for k in ("true_cost", "tokens_per_second", "speedup")),
            setting["minus_dense_at_equal_cost"],
        )
        assert tuple(value for _, value in cells[1:]) == wanted
        low, high = setting["bits_per_byte_interval"]
        assert cells[3][0] == f"{setting['bits_per_byte']:.3f} ({low:.3f} to {high:.3f})"
    criteria = rows_of(page, "Does the criterion know when both exits agree?")
    assert [name for name, _ in criteria] == list(found["criteria"])
    even = rows_of(page, "Shallow ratio from which early exit saves anything")
    assert [name for name, _ in even] == [row["criterion"] for row in found["break_even"]]
    for line in frontier_verdict(found):
        assert " ".join(line.split()) in page.text
    assert "Quality against cost, KV policy exact" in page.text
    assert "--frontier" not in page.text


def test_certificate(measured_run):
    folder, page = measured_run
    found = load_certificate(folder / "checkpoint")
    for sentence in promise(found):
        assert sentence in page.text
    grid = rows_of(page, "Thresholds tested")
    assert [float(name) for name, _ in grid] == [entry.threshold for entry in found.grid]
    for (_, cells), entry in zip(grid, found.grid, strict=True):
        numbers = (entry.shallow_ratio, entry.mean_risk, entry.p_value)
        assert tuple(value for _, value in cells) == numbers
    entries = page.column("The certificate", "value")
    assert entries["sequences"] == ("30", 30) and entries["epsilon"] == ("0.5", 0.5)
    assert entries["model SHA-256"][0] == found.model_sha256
    assert "lego calibrate" not in page.text


def test_certificate_of_another_model(measured_run, tmp_path):
    folder = Path(shutil.copytree(measured_run[0], tmp_path / "run"))
    config = folder / "checkpoint" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match="must be of this model"):
        certificate_section(folder / "checkpoint")


@pytest.mark.parametrize("found", [[], {}, 3, "x", {"settings": []}, {"settings": [{}]}], ids=str)
def test_bad_frontier(tmp_path, found):
    path = tmp_path / "frontier.json"
    assert frontier_section(path) is None
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="must be as `lego evaluate --frontier` wrote it"):
        frontier_section(path)


def test_benchmarks_of_this_repository():
    decode = read_benchmarks(RESULTS / "decode.json")
    tables = {table.caption: table for table in decode.tables}
    assert list(tables)[:4] == ["full depth", "rivals", "no exit", "early exit"]
    raw = json.loads((RESULTS / "decode.json").read_text())["benchmarks"]
    wanted = [
        row["realised_savings"]
        for found in raw
        if "test_early_exit" in found["name"]
        for row in found["extra_info"]["rows"]
    ]
    table = tables["early exit"]
    place = list(table.columns).index("realised savings")
    assert [row[place].value for row in table.rows] == wanted and None in wanted
    ops = read_benchmarks(RESULTS / "ops_cpu.json")
    table = next(table for table in ops.tables if table.caption == "exit decision")
    assert list(table.columns)[:4] == ["case", "provider", "bytes", "\N{GREEK SMALL LETTER MU}s"]
    assert table.words == {0, 1} and ops.environment["cpu"] == "AMD EPYC"
    assert sum(len(table.rows) for table in ops.tables) > 200


def test_stock_benchmarks(tmp_path):
    """Those of any other pytest-benchmark have their statistics."""
    stats = {"median": 0.25, "q1": 0.2, "q3": 0.3, "mean": 9.0}
    one = {"name": "test_a", "fullname": "x.py::test_a", "stats": stats, "param": None}
    machine = {"cpu": {"brand_raw": "<cpu>"}, "system": "Linux", "python_version": "3.11"}
    file = tmp_path / "stock.json"
    file.write_text(json.dumps({"benchmarks": [one], "machine_info": machine}))
    (table,) = read_benchmarks(file).tables
    assert table.rows == [("test_a", Cell("0.250 (0.200 to 0.300)", 0.25))]
    assert read_benchmarks(file).environment["cpu"] == "<cpu>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "must hold pytest-benchmark's JSON, got UnicodeDecodeError"),
        (b"{", "must hold pytest-benchmark's JSON, got JSONDecodeError"),
        (b"[]", "must hold pytest-benchmark's JSON, got TypeError"),
        (b'{"a": 1}', "must hold pytest-benchmark's JSON, got KeyError"),
        (b'{"benchmarks": [{"fullname": "a", "name": "a"}]}', "got KeyError: 'stats'"),
        (b'{"benchmarks": []}', "must hold at least one benchmark, got none"),
    ],
    ids=str,
)
def test_bad_benchmarks(tmp_path, content, message):
    file = tmp_path / "bench.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="make it with pytest --benchmark-json=FILE") as error:
        read_benchmarks(file)
    assert message in str(error.value) and str(file) in str(error.value)
