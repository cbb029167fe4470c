"""LEGO_BACKEND: what runs each op, what is said about it, and when it refuses."""

import os
import subprocess
import sys

import pytest
import torch

from lego_kernels import library

SHOW = """
import lego_kernels
from lego_kernels.library import backend_of
print(backend_of("kv_append", "cpu"), backend_of("kv_append", "xpu"))
"""


def run(backend: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"LEGO_BACKEND": backend}
    command = [sys.executable, "-c", SHOW]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(library.BACKEND == "reference", reason="LEGO_BACKEND=reference")
def test_this_install_has_its_native_cpu_kernels():
    assert library.NOT_LOADED["CPU"] == ""
    assert library.backend_of("kv_append", "cpu") == "native"


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_loads_what_is_there(backend):
    done = run(backend)
    assert done.stdout.split() == ["native", "reference"], done.stderr
    assert "not loaded" not in done.stderr


def test_reference_loads_nothing():
    done = run("reference")
    assert done.stdout.split() == ["reference", "reference"], done.stderr
    assert done.stderr == ""


def test_unknown_backend():
    done = run("fast")
    assert done.returncode != 0
    assert "LEGO_BACKEND: must be one of auto, native, reference, got fast" in done.stderr


def test_refuse_grad():
    wants, plain = torch.zeros(1, requires_grad=True), torch.zeros(1)
    library.refuse_grad("op", plain)
    with pytest.raises(RuntimeError, match="^op: is inference only"):
        library.refuse_grad("op", plain, wants)
    with torch.no_grad():
        library.refuse_grad("op", wants)
