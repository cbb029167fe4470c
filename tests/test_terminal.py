"""What a person sees: progress, tables, coloured text."""

import copy
import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lego.generation import GeneratedToken
from lego.run_folder import RunFolder
from lego.terminal import (
    DEEP_STYLE,
    SHALLOW_STYLE,
    ShadedText,
    TrainingDisplay,
    legend,
    print_evaluation,
    print_results,
    verdict,
)
from lego.tokenizer import train_tokenizer
from lego.training.loop import fit
from lego.training.objectives import exit_objective
from lego.training.phases import new_model
from tests.runs import (
    MODEL,
    TRAIN,
    Silent,
    finished_run,
    sentences,
    tiny_windows,
)


def console(**options):
    return Console(file=io.StringIO(), soft_wrap=True, width=200, **options)


def printed(function, *args):
    out = console()
    function(out, *args)
    return out.file.getvalue()


def token(token_id, exit_layer=4):
    return GeneratedToken(row=0, token=token_id, exit_layer=exit_layer, confidence=0.5)


@pytest.fixture(scope="module")
def results():
    return RunFolder(finished_run()[0]).results()


def rows(text):
    """Table rows as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("\u2502")]
    return [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in lines]


def test_tables_hold_the_results(results):
    text = printed(print_results, results)
    table = {row[0]: row[1:] for row in rows(text)}
    first, second, gate = (results[f"experiment_{n}"] for n in ("001", "002", "002_gate"))
    one, two = first["phase1"], first["phase2"]
    assert table["val PPL"][:2] == [f"{one['val_ppl']:.2f}", f"{two['val_ppl']:.2f}"]
    assert table["val PPL"][2] == f"{100 * (two['val_ppl'] / one['val_ppl'] - 1):+.1f} %"
    assert table["val accuracy"][0] == f"{100 * one['val_acc']:.2f} %"
    assert table["val accuracy"][2] == f"{100 * (two['val_acc'] - one['val_acc']):+.2f} points"
    assert table["hard PPL"][1] == f"{two['hard_ppl']:.2f}"
    assert table["routed PPL"] == [f"{first['two_stage']['routed_ppl']:.2f}"]
    assert table["compute cost (layers)"] == [f"{100 * first['two_stage']['layer_cost']:.1f} %"]
    for name, cell in table.items():
        if name.startswith("with cache"):
            assert cell[0] == f"{first['kv_cache']['cached_ms_per_token']:.3f}"
    assert table["without cache"][0] == f"{first['kv_cache']['uncached_ms_per_token']:.3f}"
    columns = (second, gate)
    assert table["shallow exits"] == [f"{c['shallow_tokens']} / 10" for c in columns]
    assert table["deep exits"] == [f"{c['deep_tokens']} / 10" for c in columns]
    for name, key in (
        ("actual compute cost (layers)", "layer_cost"),
        ("compute savings (layers)", "layer_savings"),
        ("true cost (bytes read)", "true_cost"),
    ):
        assert table[name] == [f"{100 * c[key]:.1f} %" for c in columns]
    assert [cell.split("x")[0] for cell in table["speedup"]] == [
        f"{c['speedup']:.2f}" for c in columns
    ]
    assert table["time efficiency"] == [f"{c['time_efficiency']:.2f}" for c in columns]
    native = results["native_engine"]
    columns = (native["exit"], native["gate"], native["speculative"])
    assert table["native true cost"] == [f"{100 * c['true_cost']:.1f} %" for c in columns]
    assert table["native, ms per token"] == [f"{c['exit_ms_per_token']:.3f}" for c in columns]
    assert f"is {native['speedup_over_reference']:.2f}x" in text
    assert f"{native['same_tokens']} of 10 tokens" in text
    assert table["dense-shallow, 2 layers"][0] == (
        f"{results['baselines']['dense_shallow']['val_ppl']:.2f}"
    )
    assert "dense-deep, 4 layers" in table
    assert {"shallow ratio", "realised savings"} <= table.keys()
    for line in verdict(results):
        assert line in text


def test_realised_savings_that_say_nothing(results):
    costly = results["experiment_002"] | {"realised_savings": None}
    text = printed(print_results, results | {"experiment_002": costly})
    assert next(row for row in rows(text) if row[0] == "realised savings")[1] == "-"


def test_no_native_engine(results):
    text = printed(print_results, results | {"native_engine": {"why_not": "it was never built"}})
    assert "No native engine: it was never built" in text


def test_comparison_is_printed(results):
    assert "comparison" not in printed(print_results, results)
    text = printed(print_results, results | {"comparison": results})
    assert text.count("Experiment 002: true early exit in generation") == 2
    assert "comparison: upper K/V exit_state, policy exact" in text


def routing(ppl, cost):
    return {"routed_ppl": ppl, "true_cost": cost}


def test_undefined_figures_are_dashes(results):
    results = copy.deepcopy(results)
    results["experiment_001"]["phase2"]["easy_ppl"] = None
    results["experiment_001"]["two_stage"]["routed_ppl"] = None
    results["experiment_002"]["realised_savings"] = None
    screen = console()
    print_results(screen, results)
    lines = screen.file.getvalue().splitlines()
    (easy,) = (line for line in lines if "easy PPL" in line)
    assert easy.split()[-2] == easy.split()[-4] == "-"


def test_joint_training_has_exits_and_no_phases(results):
    screen = console()
    print_results(screen, results | {"recipe": "joint"})
    assert "phase 1" not in screen.file.getvalue()


@pytest.mark.parametrize(
    ("nats", "cost", "said"),
    [
        (-0.05, 0.4, "pays against dense-deep: better than it"),
        (-0.05, 0.6, "does not pay against dense-deep: better than it"),
        (0.05, 0.4, "does not pay against dense-deep: worse than it"),
        (0.05, 0.6, "does not pay against dense-deep: worse than it"),
        # within two standard errors of 0.01
        (0.02, 0.4, "pays against dense-deep: as good as it"),
        (-0.02, 0.6, "does not pay against dense-deep: as good as it"),
        # at equal cost
        (-0.021, 0.5, "pays against dense-deep: better than it"),
        (0.02, 0.5, "does not pay against dense-deep: as good as it"),
    ],
)
def test_verdict(nats, cost, said):
    dense = {"val_ppl": 10, "true_cost": 0.5, "standard_error": 0.01, "lego_minus_dense_nats": nats}
    criteria = {"max_prob": routing(1, 0.9), "gate": routing(9, cost)}
    results = {"criteria": criteria, "baselines": {"dense_deep": dense}, "compared_by": "gate"}
    (line,) = verdict(results)
    assert line.startswith(f"LEGO by gate {said} (9.00 against 10.00 PPL), at a true cost of")
    assert line.endswith(f"{100 * cost:.1f} % against 50.0 %.")


def test_evaluation_table():
    exit_ = {"ppl": 7.5, "word_ppl": 99.25, "bits_per_byte": 1.5, "accuracy": 0.25}
    routing_ = {
        "threshold": 0.5,
        "shallow_ratio": 0.4,
        "layer_cost": 0.8,
        "true_cost": 0.9,
        "routed_ppl": 7.25,
    }
    found = {"exits": {"shallow": exit_, "deep": exit_}, "criteria": {"margin": routing_}}
    assert rows(printed(print_evaluation, found)) == [
        ["shallow", "7.50", "99.25", "1.5000", "25.0 %"],
        ["deep", "7.50", "99.25", "1.5000", "25.0 %"],
        ["margin", "0.5000", "40.0 %", "80.0 %", "90.0 %", "7.25"],
    ]


TEXT = (
    "\u00e9tude \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469 na\u00efve\n\ttab \ufffd."
)


@pytest.mark.parametrize("at", [0, 3, 5])
def test_shaded_text_is_the_text(at):
    """Characters of two to four bytes come in pieces, one byte a token."""
    tokenizer = train_tokenizer("bpe", sentences(20), 258)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)
    shaded = ShadedText(tokenizer, 4, ids[:at])
    pieces = [shaded.piece(token(i)).plain for i in ids[at:]]
    assert tokenizer.decode(ids[:at]) + "".join(pieces) == TEXT
    assert "" in pieces


def test_shaded_text_of_words():
    tokenizer = train_tokenizer("word", sentences(20), 300)
    ids = tokenizer.encode("ann sees the old house .")
    shaded = ShadedText(tokenizer, 4, ids[:2])
    assert [shaded.piece(token(i)).plain for i in ids[2:]] == [" the", " old", " house", " ."]


def test_shaded_text_of_bytes_that_are_no_text():
    """A byte that starts no character is shown once it is sure to be none."""
    tokenizer = train_tokenizer("bpe", sentences(20), 258)
    (start, *_), (letter,) = tokenizer.encode("\u65e5"), tokenizer.encode("a")
    shaded = ShadedText(tokenizer, 4, [])
    assert [shaded.piece(token(i)).plain for i in (start, start, letter, letter)] == [
        "",
        "",
        "\ufffd\ufffda",
        "a",
    ]


def test_colour_is_the_exit_of_the_last_token():
    tokenizer = train_tokenizer("bpe", sentences(20), 258)
    first, second = tokenizer.encode("\u00e9")
    (letter,) = tokenizer.encode("a")
    shaded = ShadedText(tokenizer, 4, [])
    styles = [
        str(shaded.piece(token(i, layer)).style)
        for i, layer in ((letter, 2), (letter, 4), (letter, 3), (first, 2), (second, 4))
    ]
    assert styles[:3] == [SHALLOW_STYLE, DEEP_STYLE, SHALLOW_STYLE]
    assert styles[4] == DEEP_STYLE
    text = legend(2, 4)
    assert text.plain == "shallow (left after layer 2), deep (ran all 4)"
    assert {str(span.style) for span in text.spans} == {SHALLOW_STYLE, DEEP_STYLE}


def train_watched(folder, state, watcher, config=TRAIN):
    model, windows = new_model(MODEL, 0), tiny_windows()
    return fit(
        model.lower_parameters(),
        exit_objective(model, windows),
        windows,
        config,
        state_path=state,
        watcher=watcher,
    )


def events(folder):
    """TensorBoard's own reading of a phase: {name: [(step, value)]}."""
    found = EventAccumulator(str(folder)).Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def losses(progress, name):
    return [(e.step, pytest.approx(getattr(e, name), rel=1e-6)) for e in progress.history]


def test_display_writes_events_and_a_line(tmp_path):
    out = console()
    with TrainingDisplay(out, tmp_path / "events") as display:
        progress = train_watched(tmp_path, tmp_path / "state", display.watch("phase1"))
    found = events(tmp_path / "events" / "phase1")
    assert len(progress.history) == 4
    for name in ("train_loss", "holdout_loss"):
        assert found[name] == losses(progress, name)
    assert [step for step, value in found["tokens_per_second"] if value > 0] == [5, 10, 15, 18]
    (line,) = out.file.getvalue().strip().splitlines()
    assert line.split()[:3] == ["phase1", "18", "steps,"]
    assert f"held-out loss {progress.best_loss:.3f} (" in line and "tokens/s)" in line


def test_events_of_a_resumed_phase(tmp_path):
    """Whatever was logged before the kill is there once, and so is all that came after."""
    saving = replace(TRAIN, checkpoint_seconds=0.0)

    class Interrupted:
        def __init__(self, watcher):
            self.watcher = watcher

        def __getattr__(self, name):
            return getattr(self.watcher, name)

        def stepped(self, step, loss, tokens):
            self.watcher.stepped(step, loss, tokens)
            if step == 11:  # the state of step 10, with its evaluation, is saved
                raise KeyboardInterrupt

    with TrainingDisplay(console(), tmp_path / "events") as display:
        watcher = Interrupted(display.watch("phase1"))
        with pytest.raises(KeyboardInterrupt):
            train_watched(tmp_path, tmp_path / "state", watcher, saving)
        watcher.events.close()  # or its thread may not have written yet
        progress = train_watched(tmp_path, tmp_path / "state", display.watch("phase1"), saving)
    assert events(tmp_path / "events" / "phase1")["holdout_loss"] == losses(
        progress, "holdout_loss"
    )


def test_finished_phase_is_done_before(tmp_path):
    progress = train_watched(tmp_path, tmp_path / "state", Silent())
    out = console()
    with TrainingDisplay(out, tmp_path / "events") as display:
        train_watched(tmp_path, tmp_path / "state", display.watch("phase1"))
    assert f"held-out loss {progress.best_loss:.3f} (done before)" in out.file.getvalue()


def test_events_of_a_finished_phase_stay(tmp_path):
    for _ in range(2):
        with TrainingDisplay(console(), tmp_path / "events") as display:
            progress = train_watched(tmp_path, tmp_path / "state", display.watch("phase1"))
    found = events(tmp_path / "events" / "phase1")
    assert found["holdout_loss"] == losses(progress, "holdout_loss")


def test_bars_on_a_terminal(tmp_path):
    """With a terminal there is a bar with loss, speed and ETA, and none of it stays."""
    out = console(force_terminal=True)
    with TrainingDisplay(out, tmp_path / "events") as display:
        watcher = display.watch("phase1")
        watcher.started(10, 2)
        watcher.stepped(3, 2.5, 64)
        watcher.stepped(4, 1.5, 64)
        (task,) = display.bars.tasks
        assert (task.completed, task.total) == (4, 10)
        assert task.fields["loss"] == pytest.approx(2.5 - 0.05 * 1.0)
        assert task.fields["speed"] > 0 and not math.isnan(task.fields["speed"])
        display.bars.refresh()
        watcher.events.close()
    assert "4/10 steps" in out.file.getvalue() and "ETA" in out.file.getvalue()
