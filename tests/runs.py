"""Tiny models, texts and runs that several test files share."""

import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lego.checkpoint import Checkpoint
from lego.cli import run_command
from lego.config import ModelConfig, TrainConfig
from lego.tokenizer import train_tokenizer
from lego.training.phases import new_model, train_lego
from lego.training.windows import Windows

MODEL = ModelConfig(
    vocab_size=300,
    dim=16,
    num_layers=4,
    exit_layer=2,
    num_heads=2,
    num_kv_heads=1,
    hidden_dim=24,
    max_seq_len=48,
)
TRAIN = TrainConfig(
    seq_len=16,
    batch_size=4,
    epochs=2,
    learning_rate=2e-3,
    warmup_steps=4,
    evals_per_epoch=2,
    holdout_ratio=0.1,
)


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self, phase=""):
        self.phase, self.calls, self.losses = phase, [], []

    def started(self, total_steps, step):
        self.calls.append(("started", total_steps, step))

    def stepped(self, step, loss, tokens):
        self.losses.append(loss)

    def evaluated(self, evaluation):
        self.calls.append(("evaluated", evaluation.step))

    def finished(self, progress):
        self.calls.append(("finished", progress.step))


class Killer(Silent):
    """Kills its own process at the start of phase `phase`, step `step`."""

    def __init__(self, phase, at):
        super().__init__(phase)
        self.at = at

    def stepped(self, step, loss, tokens):
        if (self.phase, step) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def sentences(num_paragraphs=60, seed=0):
    """Text that a tiny model can learn a little of; no two paragraphs are alike."""
    draw = random.Random(seed)
    names, verbs = "ann bob cat dan eve fay".split(), "sees hears likes follows".split()
    things = ["the red ball", "a small dog", "the old house", "a green tree"]
    paragraphs = []
    for i in range(num_paragraphs):
        lines = [
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)} ." for _ in range(5)
        ]
        paragraphs.append("\n".join([*lines, str(i)]))
    return "\n\n".join(paragraphs)


def token_ids(num_ids=600, vocab_size=50, seed=0):
    """A walk through the ids: most steps are predictable, some are not."""
    draw = np.random.default_rng(seed)
    ids = np.zeros(num_ids, dtype=np.uint16)
    for i in range(1, num_ids):
        jump = draw.random() < 0.3
        ids[i] = draw.integers(1, vocab_size) if jump else (ids[i - 1] * 7 + 1) % vocab_size
    return ids


def tiny_windows(train=TRAIN, num_ids=600):
    return Windows.split(token_ids(num_ids), train)


def tiny_checkpoint(calibration=None, **changes):
    """An untrained model with a tokenizer of its own."""
    tokenizer = train_tokenizer("bpe", sentences(20), 300)
    config = replace(MODEL, vocab_size=tokenizer.vocab_size, **changes)
    return Checkpoint(new_model(config, 0).eval(), tokenizer, calibration)


def same_tensors(one, two):
    """Equal names and equal bits, NaN included."""
    return one.keys() == two.keys() and all(
        a.dtype == two[name].dtype and a.numpy().tobytes() == two[name].numpy().tobytes()
        for name, a in one.items()
    )


def frozen_copy(parameters):
    return {name: value.detach().clone() for name, value in parameters.items()}


def train_and_record(folder, model_config, train, kill_at):
    """Train in this process, perhaps until it kills itself; leave weights and history behind.

    Runs in a process of its own, so it is a function of the module.
    """
    torch.set_num_threads(1)
    watch = functools.partial(Killer, at=kill_at) if kill_at else Silent
    trained = train_lego(model_config, train, tiny_windows(train), folder / "training", watch)
    weights = {name: t.contiguous() for name, t in trained.model.state_dict().items()}
    if model_config.tie_embeddings:
        del weights["head.weight"]
    save_file(weights, folder / "weights.safetensors")
    history = {name: [asdict(e) for e in found] for name, found in trained.history.items()}
    (folder / "history.json").write_text(json.dumps([history, trained.hard_threshold]))


def in_process(function, *args):
    """Exit code of function(*args) in a fresh process; -9 after SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    # the first optimizer imports the compiler: two seconds that every child would pay
    context.set_forkserver_preload(["lego.cli", "torch._dynamo"])
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def run_args(data, out, *more):
    """`lego run` at its smallest."""
    values = {
        "--out": out,
        "--data": data,
        "--threads": 1,
        "--data.vocab-size": 300,
        "--model.dim": 16,
        "--model.hidden-dim": 24,
        "--model.num-heads": 2,
        "--model.num-kv-heads": 2,
        "--model.max-seq-len": 48,
        "--train.seq-len": 16,
        "--train.max-tokens": 1600,
        "--train.batch-size": 8,
        "--train.warmup-steps": 3,
        "--timing.num-prompts": 2,
        "--timing.prompt-tokens": 4,
        "--timing.new-tokens": 5,
        "--timing.rounds": 2,
    }
    return ["run", *(str(part) for pair in values.items() for part in pair), *more]


@functools.cache
def finished_run():
    """(folder, text file, cache folder, stdout, stderr) of one `lego run --json`, made once."""
    root = Path(tempfile.mkdtemp(prefix="lego_test_run_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    data, out = root / "book.txt", root / "run"
    data.write_text(sentences(120))
    with (
        _cache_in(root / "cache"),
        (root / "stdout").open("w+") as stdout,
        (root / "stderr").open("w+") as stderr,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = run_command(run_args(data, out, "--json"))
    texts = [(root / name).read_text() for name in ("stdout", "stderr")]
    assert code == 0, texts
    return out, data, root / "cache", *texts


@functools.cache
def own_run():
    """Folder of one `lego train` whose upper layers have keys and values of their own; to read."""
    _, data, cache, *_ = finished_run()
    out = cache.parent / "own"
    with _cache_in(cache), contextlib.redirect_stdout(io.StringIO()):
        assert run_command(["train", *run_args(data, out, "--model.upper-kv", "own")[1:]]) == 0
    return out


@contextlib.contextmanager
def _cache_in(folder):
    before = os.environ.get("LEGO_CACHE")
    os.environ["LEGO_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["LEGO_CACHE"]
        if before is not None:
            os.environ["LEGO_CACHE"] = before
