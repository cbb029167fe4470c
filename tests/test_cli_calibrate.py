"""`lego calibrate`, and `lego generate --threshold certified`, on runs trained on a tiny text."""

import json
import logging
import shutil

import pytest

from lego.certificate import hoeffding_bentkus, load_certificate
from lego.checkpoint import load_checkpoint
from lego.cli import run_command
from lego.run_folder import RunFolder
from tests.runs import finished_run, own_run

# half of the tokens may disagree: a model this small passes with few sequences
DEFAULT = ("--epsilon", "0.5", "--delta", "0.2", "--num-sequences", "30", "--max-new-tokens", "6")
LAX = (*DEFAULT, "--grid", "0.012", "0.05", "0.016")
# the grid's boldest threshold lets every token exit, and some are other ones than at full depth
STRICT = ("--epsilon", "0.05", "--num-sequences", "60", "--grid", "0", "--max-new-tokens", "6")


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


@pytest.fixture
def run(tmp_path):
    """A run of our own, without a certificate."""
    shutil.copytree(finished_run()[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def certified_run(tmp_path_factory):
    """A run with a certificate, to read."""
    out = tmp_path_factory.mktemp("certified") / "run"
    shutil.copytree(finished_run()[0], out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(finished_run()[2]))
        assert run_command(["calibrate", str(out), *LAX]) == 0
    return out


def calibrate(capsys, folder, *options, code=0):
    assert run_command(["calibrate", str(folder), *map(str, options)]) == code
    return capsys.readouterr()


def generate(capsys, folder, *options):
    args = ["generate", str(folder), "--prompt", "ann sees", "--json", *map(str, options)]
    assert run_command(args) == 0
    found = json.loads(capsys.readouterr().out)
    return found["tokens"], found["exit_layer"]


def refused(capsys, args, *messages):
    """Exit code 2, one line on stderr with these messages, nothing on stdout."""
    assert run_command([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("lego: ")
    for message in messages:
        assert message in err


def refused_generation(capsys, folder, options, *messages):
    args = ["generate", folder, "--prompt", "ann", "--threshold", "certified", *options]
    refused(capsys, args, *messages)


@pytest.mark.parametrize("risk", ["disagreement", "loss"])
def test_calibrate(run, capsys, risk):
    options = ("--risk", risk, *DEFAULT, "--prompt-tokens", 3)
    shown = calibrate(capsys, run, *options)
    assert f"Risk ({risk}) by threshold of max_prob: 30 sequences from 7 documents" in shown.out
    assert "Certified: max_prob >= " in shown.out and "With probability 0.8 over" in shown.out
    # 300 tokens at most: half of the log of their number
    what = "at most 50 % of the generated" if risk == "disagreement" else "loses at most 2.8"
    assert what in shown.out and "share 7 documents" in shown.out
    assert "--threshold certified --max-new-tokens 6" in shown.out
    out, err = calibrate(capsys, run, *options, "--json")
    found, certificate = json.loads(out), load_certificate(run / "checkpoint")
    assert "Certified: max_prob" in err and "\x1b[" not in err
    kept = {name: getattr(certificate, name) for name in found if name != "grid"}
    assert kept == {name: value for name, value in found.items() if name != "grid"}
    assert [vars(entry) for entry in certificate.grid] == found["grid"]
    assert (certificate.epsilon, certificate.delta, certificate.risk) == (0.5, 0.2, risk)
    assert (certificate.prompt_tokens, certificate.max_new_tokens) == (3, 6)
    assert (certificate.criterion, certificate.kv_policy) == ("max_prob", "exact")
    assert certificate.engine == ("native" if risk == "disagreement" else "reference")
    assert (certificate.loss_bound is None) == (risk == "disagreement")
    assert len(certificate.grid) == 22
    means = [entry.mean_risk for entry in certificate.grid]
    p_values = [entry.p_value for entry in certificate.grid]
    assert p_values == hoeffding_bentkus(means, 30, 0.5).tolist()
    assert max(means) > 0 and certificate.threshold == certificate.grid[-1].threshold


def test_loss_bound(run, capsys):
    """The risks are shares of it, as long as none is clipped."""
    options = ("--risk", "loss", *LAX)
    calibrate(capsys, run, *options)
    wide = load_certificate(run / "checkpoint")
    out, _ = calibrate(capsys, run, *options, "--loss-bound", 1)
    narrow = load_certificate(run / "checkpoint")
    assert "early exit loses at most 0.5 nats a token" in out and narrow.loss_bound == 1
    assert wide.grid[-1].mean_risk > 0
    for one, two in zip(wide.grid, narrow.grid, strict=True):
        assert one.mean_risk * wide.loss_bound == pytest.approx(two.mean_risk)


def test_one_sequence_a_document(run, capsys):
    """Of seven documents: nothing is shared, and nothing said of it."""
    out, _ = calibrate(capsys, run, *LAX, "--num-sequences", 5)
    assert "5 sequences from 5 documents" in out and "share 5" not in out


def test_the_prompts_are_of_the_calibration_split(run, capsys, monkeypatch):
    corpus = RunFolder(run).corpus()
    seen = []
    monkeypatch.setattr(
        "lego.certify.draw_sequences", lambda ids, *rest: seen.append(ids.tolist()) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_command(["calibrate", str(run), *LAX])
    assert seen == [corpus.calibration.ids.tolist()]


def test_sequences_stop_as_generation_does(run, capsys, monkeypatch):
    """The end-of-text token ends both."""
    seen = []
    monkeypatch.setattr(
        "lego.certify.disagreement", lambda *args, **options: seen.append(options) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_command(["calibrate", str(run), *LAX])
    end_of_text = load_checkpoint(run / "checkpoint").tokenizer.end_of_text_id
    assert seen[0]["stop_tokens"] == [end_of_text]


def test_generate_with_it(run, capsys):
    calibrate(capsys, run, *LAX, "--criterion", "margin")
    certificate = load_certificate(run / "checkpoint")
    assert [entry.threshold for entry in certificate.grid] == [0.05, 0.016, 0.012]
    by_number = ("--threshold", certificate.threshold, "--criterion", "margin")
    wanted = generate(capsys, run, "--max-new-tokens", 6, *by_number)
    for more in ((), ("--criterion", "margin"), ("--kv-policy", "exact", "--engine", "reference")):
        certified = ("--max-new-tokens", 6, "--threshold", "certified", *more)
        assert generate(capsys, run, *certified) == wanted
    default = generate(capsys, run, "--max-new-tokens", 6)
    assert default[1] != wanted[1], "a test that another threshold passes, too"
    held = ("--max-new-tokens", 6, "--hold-shallow-ratio", "0.5")
    refused_generation(capsys, run, held, "certified threshold must stay as it is", "to hold")


def test_the_policy_is_the_certificates(tmp_path, capsys):
    shutil.copytree(own_run(), tmp_path / "run")
    common = ["generate", str(tmp_path / "run"), "--prompt", "ann sees", "--json"]

    def found(*options):
        assert run_command([*common, "--max-new-tokens", "6", *options]) == 0
        return json.loads(capsys.readouterr().out)

    # some tokens exit and others do not
    middle = str(sorted(found("--threshold", "0")["confidence"])[3])
    calibrate(capsys, tmp_path / "run", *DEFAULT, "--grid", middle, "--kv-policy", "hole")
    certified = found("--threshold", "certified")["stats"]["decode"]
    assert certified == found("--threshold", middle, "--kv-policy", "hole")["stats"]["decode"]
    assert certified != found("--threshold", middle)["stats"]["decode"]
    refused_generation(
        capsys,
        tmp_path / "run",
        ("--kv-policy", "recompute"),
        "--kv-policy must be hole",
        "got rec",
    )


def test_no_threshold_passes(run, capsys):
    calibrate(capsys, run, *LAX)
    out, err = calibrate(capsys, run, *STRICT, "--json", code=1)
    found = json.loads(out)
    assert found["threshold"] is None and found["grid"][0]["p_value"] == 1.0
    assert "No threshold can be certified: at 0, the safest, the mean risk is 0.1" in err
    assert "It would pass from --epsilon 0." in err
    assert "More sequences alone will not help: try a safer threshold in --grid" in err
    assert "A threshold without any risk passes from --num-sequences 59 on" in err
    # the older promise is gone
    assert f"The older certificate of {run} was removed." in err
    refused_generation(capsys, run, (), "must hold certificate.json, got none", "`lego calibrate`")
    out, err = calibrate(capsys, run, *STRICT, code=1)
    assert "No threshold can be certified" in out and "older" not in out and not err


def test_advice_is_right(run, capsys):
    """The epsilon that it names passes, a smaller one does not, and asks for more sequences."""
    _, err = calibrate(capsys, run, *STRICT, "--json", code=1)
    epsilon = err.partition("from --epsilon ")[2].split()[0]
    calibrate(capsys, run, *STRICT, "--epsilon", epsilon)
    out, _ = calibrate(capsys, run, *STRICT, "--epsilon", float(epsilon) - 2e-4, code=1)
    assert int(out.partition("would pass with --num-sequences ")[2].split(".")[0]) > 60


def test_certificate_of_another_model(run, capsys):
    calibrate(capsys, run, *LAX)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(own_run() / "checkpoint" / name, run / "checkpoint" / name)
    refused_generation(capsys, run, (), "must be of this model, SHA-256", "`lego calibrate`")


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1', "[]"])
def test_damaged_certificate(run, capsys, content):
    (run / "checkpoint" / "certificate.json").write_text(content)
    refused_generation(capsys, run, (), "certificate.json must be as `lego cal", "make one with")
    # nothing else minds
    generate(capsys, run, "--max-new-tokens", 3)
    calibrate(capsys, run, *LAX)
    generate(capsys, run, "--max-new-tokens", 3, "--threshold", "certified")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--criterion", "gate"), "--criterion must be max_prob, which --threshold certified"),
        (("--kv-policy", "hole"), "--kv-policy must be exact, which --threshold certified is for"),
        (("--max-new-tokens", "7"), "--max-new-tokens must be <= 6, the length that"),
        (("--temperature", "0.5"), "--temperature must be 0, since --threshold certified"),
        (("--mode", "full"), "--threshold certified must come with early-exit, got full"),
        (("--mode", "speculative"), "must come with early-exit, got speculative"),
        (("--mode", "uncached"), "must come with early-exit, got uncached"),
    ],
)
def test_outside_of_what_was_certified(certified_run, capsys, options, message):
    capsys.readouterr()
    refused_generation(capsys, certified_run, ("--max-new-tokens", "6", *options), message)


def test_fewer_tokens_are_warned_about(certified_run, capsys, caplog):
    run = certified_run
    capsys.readouterr()
    with caplog.at_level(logging.WARNING):
        generate(capsys, run, "--max-new-tokens", 6, "--threshold", "certified")
        assert not caplog.messages
        generate(capsys, run, "--max-new-tokens", 2, "--threshold", "certified")
    (message,) = caplog.messages
    assert "is for the mean over 6 new tokens; that over the first 2 may be higher" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epsilon", "0"), "epsilon must be in (0, 1), got 0"),
        (("--epsilon", "1"), "epsilon must be in (0, 1), got 1"),
        (("--epsilon", "nan"), "epsilon must be in (0, 1), got nan"),
        (("--delta", "1.5"), "delta must be in (0, 1), got 1.5"),
        (("--epsilon", "0.01"), "num_sequences must be >= 161 for epsilon=0.01 and delta=0.2"),
        (("--num-sequences", "2"), "must be >= 3 for epsilon=0.5 and delta=0.2, or not even"),
        (("--num-sequences", "2000"), "must hold 2000 sequences of 4 tokens, got 92; take fewer"),
        (("--risk", "loss", "--num-sequences", "200"), "must hold 200 sequences of 10 tokens, got"),
        (("--max-new-tokens", "0"), "max_new_tokens must be >= 1, got 0"),
        (("--prompt-tokens", "0"), "prompt_tokens must be >= 1, got 0"),
        (("--max-new-tokens", "45"), "must fit max_seq_len=48, got 4 + 45"),
        (("--grid", "0.5", "inf"), "grid must hold finite thresholds, got (0.5, inf)"),
        (("--kv-policy", "hole"), "kv_policy: must be one of ('exact',)"),
        (("--loss-bound", "1"), "--loss-bound must come with loss, got disagreement"),
        (("--risk", "loss", "--loss-bound", "0"), "loss_bound must be positive, got 0"),
        (("--risk", "loss", "--engine", "native"), "--engine native must come with disagreement"),
    ],
)
def test_bad_options(run, capsys, options, message):
    """Nothing is written, and an older certificate stays."""
    certificate = run / "checkpoint" / "certificate.json"
    certificate.write_text("older")
    refused(capsys, ["calibrate", run, *LAX, *options], message)
    assert certificate.read_text() == "older"


@pytest.mark.parametrize("options", [(), ("--epsilon", "0.1", "--risk", "none")])
def test_bad_arguments(capsys, options):
    with pytest.raises(SystemExit) as error:
        run_command(["calibrate", "run", *options])
    assert error.value.code == 2
    assert not capsys.readouterr().out


def test_no_run(tmp_path, capsys):
    refused(capsys, ["calibrate", tmp_path / "none", *LAX], str(tmp_path / "none"))


def test_reference_engine(run, capsys):
    calibrate(capsys, run, *LAX, "--engine", "reference")
    reference = load_certificate(run / "checkpoint")
    calibrate(capsys, run, *LAX, "--engine", "native")
    native = load_certificate(run / "checkpoint")
    assert (reference.engine, native.engine) == ("reference", "native")
    assert reference.grid == native.grid and reference.data_sha256 == native.data_sha256
