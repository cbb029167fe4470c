"""Every kernel test runs once per provider: plain torch, each CPU instruction set, Triton, CUDA."""

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from lego_kernels import library


def _providers(op: str) -> list:
    triton = [pytest.param("triton", id="triton")]
    if importlib.util.find_spec(f"lego_kernels.triton.{op}") is None:
        triton = []
    cuda = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
    return ["torch", *library.CPU_ISAS, *triton, cuda]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", _providers(metafunc.module.OP), indirect=True)


@pytest.fixture
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the wrapper of the module's OP run on one provider; yields the provider's name."""
    module, name = import_module(f"lego_kernels.ops.{request.module.OP}"), request.param
    isa: object = nullcontext()
    if name == "torch":
        monkeypatch.setattr(module, "_op", getattr(module, f"_{request.module.OP}_torch"))
    elif name == "triton":
        if request.node.callspec.params.get("dtype") is torch.bfloat16:
            pytest.skip("Triton's interpreter rounds to bfloat16 toward zero")
        _interpret_triton(monkeypatch, module, request.module.OP)
    elif name != "cuda":
        if name not in library.cpu_isas():
            pytest.skip(f"{name}: {library.NOT_LOADED['CPU'] or 'this CPU lacks it'}")
        isa = library.use_cpu_isa(name)
    with isa:
        yield name


def _interpret_triton(monkeypatch, module, op: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("where there is a GPU, the provider `cuda` runs the Triton kernels")
    launcher = getattr(import_module(f"lego_kernels.triton.{op}"), f"launch_{op}")
    monkeypatch.setattr(module, "_op", launcher)


@pytest.fixture
def device(provider: str) -> str:
    """Where the provider's tensors lie."""
    return "cuda" if provider == "cuda" else "cpu"
