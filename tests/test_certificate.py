"""p-values against binomial tails, fixed-sequence testing, and the certificate's file."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lego.certificate import (
    Certificate,
    hash_ids,
    hash_model,
    hoeffding_bentkus,
    learn_then_test,
    load_certificate,
    num_certified,
    save_certificate,
    sequences_needed,
    smallest_epsilon,
)
from lego.checkpoint import save_checkpoint
from tests.runs import tiny_checkpoint

LEVELS = (0.001, 0.02, 0.05, 0.1, 0.25, 0.5, 0.9)


def test_p_value_by_hand():
    """No risk at all: 0.8 ** 10. Else the smaller of the two bounds."""
    assert hoeffding_bentkus(0.0, 10, 0.2) == pytest.approx(0.1073741824, rel=1e-12)
    kl = 0.1 * math.log(0.1 / 0.3) + 0.9 * math.log(0.9 / 0.7)
    assert math.exp(-20 * kl) == pytest.approx(0.0976, abs=1e-4)
    tail = sum(math.comb(20, k) * 0.3**k * 0.7 ** (20 - k) for k in range(3))
    assert math.e * tail == pytest.approx(0.0965, abs=1e-4)
    assert hoeffding_bentkus(0.1, 20, 0.3) == pytest.approx(math.e * tail, rel=1e-12)
    # five times as many: e is dearer than what it buys
    kl = 0.01 * math.log(0.01 / 0.05) + 0.99 * math.log(0.99 / 0.95)
    tail = 0.95**100 + 100 * 0.05 * 0.95**99
    assert math.exp(-100 * kl) < math.e * tail
    assert hoeffding_bentkus(0.01, 100, 0.05) == pytest.approx(math.exp(-100 * kl), rel=1e-12)


def test_p_value_at_and_above_epsilon_is_one():
    assert hoeffding_bentkus([0.05, 0.3, 1.0], 40, 0.05).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("n", [1, 2, 7, 40, 200])
@pytest.mark.parametrize("epsilon", LEVELS)
def test_p_value_is_valid_for_coins(n, epsilon):
    """P(p <= level) <= level for every level, exactly: p is never below the binomial tail."""
    heads = np.arange(n + 1)
    p_value = hoeffding_bentkus(heads / n, n, epsilon)
    tail = stats.binom.cdf(heads, n, epsilon)
    assert (p_value >= tail * (1 - 1e-9)).all()
    # and it is not far above: e times at most
    assert (p_value <= np.minimum(1, math.e * tail) * (1 + 1e-9)).all()


def test_a_rounding_error_is_no_sequence():
    total = sum([0.1] * 3)
    assert total > 0.3
    below, exact, above = hoeffding_bentkus([0.3 / 30, 0.01, 30 * total / 900], 30, 0.3)
    assert below == exact == above
    means = np.array([1 / 3, np.nextafter(1 / 3, 1), np.nextafter(1 / 3, 0)])
    assert np.ceil(means * 30).max() == 11  # ten risks of 1 have become eleven
    assert np.ptp(hoeffding_bentkus(means, 30, 0.6)) < 1e-12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 300), st.floats(0.01, 0.99))
def test_p_value_grows_with_the_risk(one, two, n, epsilon):
    p_one, p_two = hoeffding_bentkus([min(one, two), max(one, two)], n, epsilon)
    assert 0 < p_one <= p_two * (1 + 1e-9) and p_two <= 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_p_value_falls_with_epsilon(mean, n, one, two):
    strict, lax = (float(hoeffding_bentkus(mean, n, e)) for e in (min(one, two), max(one, two)))
    assert lax <= strict * (1 + 1e-9)


def test_the_first_failure_ends_it():
    p_values = [[0.01, 0.05, 0.051, 0.0], [0.2, 0, 0, 0], [0, 0, 0, 0], [0, math.nan, 0, 0]]
    assert num_certified(p_values, 0.05).tolist() == [2, 0, 4, 1]


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product(LEVELS, LEVELS)))
def test_sequences_needed(epsilon, delta):
    n = sequences_needed(epsilon, delta)
    assert hoeffding_bentkus(0.0, n, epsilon) <= delta
    assert n == 1 or hoeffding_bentkus(0.0, n - 1, epsilon) > delta
    for mean in (0.3 * epsilon, 0.9 * epsilon):
        n = sequences_needed(epsilon, delta, mean)
        assert hoeffding_bentkus(mean, n, epsilon) <= delta


def test_sequences_needed_by_hand():
    assert sequences_needed(0.05, 0.05) == 59  # 0.95 ** 58 = 0.0510
    assert sequences_needed(0.5, 0.25) == 2


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("n", [10, 30, 500])
def test_smallest_epsilon(mean, n):
    epsilon = smallest_epsilon(mean, n, 0.1)
    assert mean < epsilon < 1
    assert hoeffding_bentkus(mean, n, epsilon * (1 + 1e-6)) <= 0.1
    assert hoeffding_bentkus(mean, n, epsilon * (1 - 1e-6)) > 0.1


@pytest.mark.parametrize(("mean", "n"), [(1.0, 1), (1.0, 500), (0.99, 1)])
def test_no_epsilon_is_large_enough(mean, n):
    assert smallest_epsilon(mean, n, 0.1) == 1


def risks(*means, n=100):
    """Sequences of risk 0 or 1 with these means."""
    return (np.arange(n) < n * np.array(means)[:, None]).astype(float)


def test_learn_then_test():
    risk, ratio = risks(0, 0.01, 0.2, 0), np.array([0.1, 0.3, 0.6, 0.9])
    threshold, grid = learn_then_test([0.9, 0.7, 0.5, 0.3], risk, ratio, epsilon=0.1, delta=0.05)
    assert threshold == 0.7  # 0.3 comes after one that failed
    assert [entry.threshold for entry in grid] == [0.9, 0.7, 0.5, 0.3]
    assert [entry.mean_risk for entry in grid] == [0, 0.01, 0.2, 0]
    assert [entry.p_value for entry in grid] == hoeffding_bentkus(
        [0, 0.01, 0.2, 0], 100, 0.1
    ).tolist()
    assert [entry.shallow_ratio for entry in grid] == ratio.tolist()
    assert all(type(value) is float for entry in grid for value in vars(entry).values())
    threshold, _ = learn_then_test([0.9, 0.7], risk[2:], ratio[2:], epsilon=0.1, delta=0.05)
    assert threshold is None


@pytest.mark.parametrize(
    ("thresholds", "risk", "message"),
    [
        ([0.5, 0.5], risks(0, 0), r"thresholds must descend, got \(0.5, 0.5\)"),
        ([0.5, 0.7], risks(0, 0), "thresholds must descend"),
        ([0.5], risks(0, 0), r"risk must be \[1, N\] with N >= 1, got \(2, 100\)"),
        ([0.5], np.zeros((1, 0)), "N >= 1"),
        ([0.5], np.full((1, 3), 1.1), r"in \[0, 1\], got 1.1 to 1.1"),
        ([0.5], np.array([[0.0, -0.1]]), r"in \[0, 1\], got -0.1 to 0.0"),
        ([0.5], np.array([[0.0, math.nan]]), r"in \[0, 1\], got nan"),
    ],
)
def test_learn_then_test_refuses(thresholds, risk, message):
    with pytest.raises(ValueError, match=f"^learn_then_test: .*{message}"):
        learn_then_test(thresholds, risk, np.zeros(len(risk)), epsilon=0.1, delta=0.1)


@pytest.mark.parametrize("name", ["epsilon", "delta"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_levels_must_be_between_zero_and_one(name, value):
    levels = {"epsilon": 0.1, "delta": 0.1} | {name: value}
    with pytest.raises(ValueError, match=rf"^calibrate: {name} must be in \(0, 1\), got {value}$"):
        learn_then_test([0.5], risks(0), np.zeros(1), **levels)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_checkpoint(folder, tiny_checkpoint())
    return folder


@pytest.fixture
def folder(saved_model, tmp_path):
    """A checkpoint folder of our own."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved_model / name).read_bytes())
    return tmp_path


def certificate_for(folder, *means):
    thresholds = [0.9, 0.7, 0.5][: len(means)]
    threshold, grid = learn_then_test(
        thresholds, risks(*means), np.array([0.1, 0.3, 0.6])[: len(means)], epsilon=0.1, delta=0.05
    )
    return Certificate(
        risk="loss",
        epsilon=0.1,
        delta=0.05,
        threshold=threshold,
        grid=grid,
        num_sequences=100,
        num_documents=7,
        criterion="gate",
        kv_policy="exact",
        prompt_tokens=4,
        max_new_tokens=8,
        loss_bound=math.log(300),
        engine="reference",
        model_sha256=hash_model(folder),
        data_sha256=hash_ids(np.arange(5)),
        environment={"torch": "2.13.0"},
    )


def test_saved_and_loaded(folder):
    certificate = certificate_for(folder, 0, 0.01, 0.3)
    assert certificate.certified == certificate.grid[1]
    save_certificate(folder, certificate)
    assert load_certificate(folder) == certificate


def test_nothing_promised_removes_an_older_promise(folder):
    save_certificate(folder, certificate_for(folder, 0, 0.01))
    nothing = certificate_for(folder, 0.5)
    assert nothing.threshold is None
    save_certificate(folder, nothing)
    with pytest.raises(ValueError, match="must hold certificate.json, got none; make one with"):
        load_certificate(folder)
    save_certificate(folder, nothing)  # nothing there to remove


def test_a_model_saved_anew_has_no_certificate(tmp_path):
    checkpoint = tiny_checkpoint()
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    save_certificate(tmp_path / "checkpoint", certificate_for(tmp_path / "checkpoint", 0))
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    with pytest.raises(ValueError, match="got none"):
        load_certificate(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_model(folder, name):
    save_certificate(folder, certificate_for(folder, 0))
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="must be of this model, SHA-256 .*, got one of .*; make"):
        load_certificate(folder)


def test_hashes():
    ids = np.arange(9, dtype=np.uint16)
    assert hash_ids(ids) == hash_ids(ids.astype(np.int64)) != hash_ids(ids[:-1])


def changed(values, **changes):
    return json.dumps(values | changes)


DAMAGE = {
    "half": lambda values: json.dumps(values)[:200],
    "empty": lambda values: "",
    "list": lambda values: "[1]",
    "number": lambda values: "3",
    "format": lambda values: changed(values, format=2),
    "no format": lambda values: json.dumps({k: v for k, v in values.items() if k != "format"}),
    "no field": lambda values: json.dumps({k: v for k, v in values.items() if k != "criterion"}),
    "new field": lambda values: changed(values, more=1),
    "criterion": lambda values: changed(values, criterion="luck"),
    "kv policy": lambda values: changed(values, kv_policy=None),
    "length": lambda values: changed(values, max_new_tokens="8"),
    "no length": lambda values: changed(values, max_new_tokens=0),
    "fewer sequences": lambda values: changed(values, num_sequences=90),
    "smaller epsilon": lambda values: changed(values, epsilon=0.05),
    "smaller delta": lambda values: changed(values, delta=1e-4),
    "epsilon": lambda values: changed(values, epsilon="0.1"),
    "no epsilon": lambda values: changed(values, epsilon=0),
    "bolder": lambda values: changed(values, threshold=0.5),
    "not in the grid": lambda values: changed(values, threshold=0.6),
    "no threshold": lambda values: changed(values, threshold=None),
    "grid": lambda values: changed(values, grid=3),
    "no grid": lambda values: changed(values, grid=[]),
    "p-value": lambda values: changed(values, grid=[values["grid"][0] | {"p_value": 0.01}]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file(folder, damage):
    path = folder / "certificate.json"
    save_certificate(folder, certificate_for(folder, 0, 0.01, 0.3))
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match="^certificate: .*certificate.json must be as `lego cal"):
        load_certificate(folder)


def test_not_utf8(folder):
    (folder / "certificate.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be as `lego calibrate` wrote it, got .*; make one"):
        load_certificate(folder)


def test_a_certificate_says_which_entry_it_is(folder):
    certificate = certificate_for(folder, 0, 0.01, 0.3)
    assert replace(certificate, threshold=0.9).certified == certificate.grid[0]
