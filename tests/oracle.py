"""What the tests of every op share: the devices to run on, and how close is close enough."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
NEEDS_NVCC = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="needs nvcc, which is not on PATH"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# what a kernel may err beyond twice eager's error, relative to the largest exact value: half a unit
# in the last place, for values that eager happens to hit
FLOORS = {torch.float32: 2**-22, torch.bfloat16: 2**-9, torch.float16: 2**-12}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0) -> Tensor:
    """Normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Byte for byte: also where a NaN, or the sign of a zero, would hide from torch.equal."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bits = _BITS[got.element_size()]
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


def assert_error_bounded(got: Tensor, eager: Tensor, exact: Tensor, *, floor: float) -> None:
    """The kernel may err twice as much as eager PyTorch does in the same dtype, plus a floor."""
    assert got.shape == eager.shape == exact.shape
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    bound = 2 * (eager.double() - exact).abs().max().item() + floor
    assert error <= bound, f"error {error:.3g} is above {bound:.3g}"


def run_on_host(program: str, folder: Path) -> None:
    """Compile a program that includes device code, and run it on the CPU; its asserts decide."""
    source = folder / "program.cu"
    source.write_text(program)
    command = ["nvcc", "-I", CUDA_SOURCES, "-o", folder / "program", source]
    subprocess.run(command, check=True)
    subprocess.run([folder / "program"], check=True)
