"""The instruction sets of the CPU kernels: how one is chosen, and the arithmetic of vec*.h."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from lego_kernels import library
from tests.oracle import assert_same_bits

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
ISAS = pytest.mark.parametrize("isa", library.CPU_ISAS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# every function takes and fills `size` values; those named one_ go value by value
SOURCE = """
#ifdef LEGO_ISA_PASS
template <class From, class To>
void convert(const void* from, void* to, int64_t size) {
  const From* x = static_cast<const From*>(from);
  To* y = static_cast<To*>(to);
  for_each_vec(size, [&](int64_t i) { store(y + i, load(x + i)); },
               [&](int64_t i, int64_t rest) { store_first(y + i, load_first(x + i, rest), rest); });
}
template <class From, class To>
void one(const void* from, void* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    from_float(to_float(static_cast<const From*>(from)[i]), static_cast<To*>(to) + i);
  }
}
template <Vec f(Vec)>
void map(const void* from, void* to, int64_t size) {
  const float* x = static_cast<const float*>(from);
  float* y = static_cast<float*>(to);
  const auto rest = [&](int64_t i, int64_t count) {
    store_first(y + i, f(load_first(x + i, count)), count);
  };
  for_each_vec(size, [&](int64_t i) { store(y + i, f(load(x + i))); }, rest);
}
inline Vec sum_lanes(Vec x) { return splat(sum(x)); }
inline Vec largest_lane(Vec x) { return splat(largest(x)); }
Function* const functions[] = {
    convert<bf16, float>, one<bf16, float>, convert<f16, float>, one<f16, float>,
    convert<float, bf16>, one<float, bf16>, convert<float, f16>, one<float, f16>,
    map<exp>, map<log>, map<sum_lanes>, map<largest_lane>};
#else
#include "dtype.h"
typedef void Function(const void*, void*, int64_t);
#define LEGO_OP_FILE "arithmetic.cpp"
#include "for_each_isa.h"
extern "C" void call(int isa, int function, const void* from, void* to, int64_t size) {
#if defined(__x86_64__)
  Function* const* const isas[] = {lego::scalar::functions, lego::avx2::functions,
                              lego::avx512::functions, lego::avx512_bf16::functions};
#else
  Function* const* const isas[] = {lego::scalar::functions};
#endif
  isas[isa][function](from, to, size);
}
#endif
"""
FUNCTIONS = (
    "bfloat16_float32 one_bfloat16_float32 float16_float32 one_float16_float32 "
    "float32_bfloat16 one_float32_bfloat16 float32_float16 one_float32_float16 "
    "exp log sum largest"
).split()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip(f"needs a C++ compiler, and {COMPILER} is not on PATH")
    folder = tmp_path_factory.mktemp("isa")
    source, built = folder / "arithmetic.cpp", folder / "arithmetic.so"
    source.write_text(SOURCE)
    include = [f"-I{path}" for path in (folder, ROOT / "csrc/cpu", *cpp_extension.include_paths())]
    flags = ["-std=c++20", "-O3", "-shared", "-fPIC", *include]
    subprocess.run([*COMPILER.split(), *flags, str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def call(program, isa):
    """call(function, x, dtype): what the function of vec*.h makes of x, and nothing beyond it."""
    if isa not in library.cpu_isas():
        pytest.skip(f"{isa}: {library.NOT_LOADED['CPU'] or 'this CPU lacks it'}")

    def run(function: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.full((x.numel() + 16,), 7, dtype=dtype)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
        index = library.CPU_ISAS.index(isa)
        program.call(index, FUNCTIONS.index(function), *pointers, ctypes.c_int64(x.numel()))
        assert torch.all(out[x.numel() :] == 7)
        return out[: x.numel()]

    return run


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits, but that a NaN may be any other."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_same_bits(got.masked_fill(nan, 0), expected.masked_fill(nan, 0))


def floats(start: int, stop: int, step: int = 1) -> Tensor:
    """The float32 values whose bits are in a range."""
    return torch.arange(start, stop, step).to(torch.int32).view(torch.float32)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


@ISAS
@HALVES
@pytest.mark.parametrize("way", ["", "one_"])
def test_every_16_bit_pattern(way, dtype, isa, call):
    x = every_half(dtype)
    function = f"{way}{name(dtype)}_float32"
    assert_same(call(function, x), x.float())
    assert_same(call(f"{way}float32_{name(dtype)}", x.float(), dtype), x)
    torch.set_flush_denormal(True)
    try:
        flushed = call(function, x)
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, x.float())


@ISAS
@HALVES
@pytest.mark.parametrize("way", ["", "one_"])
def test_rounding_from_float32(way, dtype, isa, call):
    # every sign, exponent and 10 bits of mantissa, with what follows at, beside and far from a tie
    # for the 7 bits of bfloat16 and the 10 of float16
    upper = torch.arange(1 << 19) << 13
    lower = torch.tensor([0, 1, 0xFFE, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    x = (upper[:, None] + lower).flatten().to(torch.int32).view(torch.float32)
    assert_same(call(f"{way}float32_{name(dtype)}", x, dtype), x.to(dtype))


@ISAS
@HALVES
def test_first_values_alone_are_touched(dtype, isa, call):
    for size in range(34):
        x = torch.arange(1.0, size + 1)
        assert_same_bits(call(f"float32_{name(dtype)}", x, dtype), x.to(dtype))
        assert_same_bits(call(f"{name(dtype)}_float32", x.to(dtype)), x)
        assert_same_bits(call("exp", x * 0), torch.ones(size))


def assert_within_2_ulp(got: Tensor, exact: Tensor) -> None:
    ulp = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 24)
    error = (got.double() - exact).abs() / ulp
    assert error.max() <= 2, f"{error.max()} ulp"


@ISAS
def test_exp(isa, call):
    magnitude = torch.cat([floats(0, 0x42B20000, 997), floats(0x42AE0000, 0x42B20000)])  # to 89
    x = torch.cat([magnitude, -magnitude])
    got, exact = call("exp", x), x.double().exp()
    above, below = exact > torch.finfo(torch.float32).max, exact < 2**-126
    assert above.any() and torch.all(got[above] == float("inf"))
    assert below.any() and torch.all(got[below] == 0)
    normal = ~(above | below)
    assert_within_2_ulp(got[normal], exact[normal])
    special = torch.tensor([float("-inf"), -1e30, 0, -0.0, 1e-40, 1e30, float("inf"), float("nan")])
    inf = float("inf")
    assert_same(call("exp", special), torch.tensor([0, 0, 1, 1, 1, inf, inf, float("nan")]))


@ISAS
def test_log(isa, call):
    x = torch.cat([floats(0x00800000, 0x7F800000, 1999), floats(0x3F7F0000, 0x3F810000)])
    got, exact = call("log", x), x.double().log()
    one = x == 1
    assert torch.all(got[one] == 0)
    assert_within_2_ulp(got[~one], exact[~one])


@ISAS
def test_lanes_are_added_halves_to_halves(isa, call):
    lanes = {"scalar": 4, "avx2": 8}.get(isa, 16)
    x = torch.randn(lanes, generator=torch.Generator().manual_seed(0)) * 10 ** torch.arange(lanes)
    added = x
    while len(added) > 1:
        added = added[: len(added) // 2] + added[len(added) // 2 :]
    assert_same_bits(call("sum", x), added.expand(lanes).contiguous())
    assert call("largest", x)[0] == x.max()
    x[[0, -1]] = float("nan")
    assert call("largest", x)[0] == x[1:-1].max()
    assert call("largest", torch.full((lanes,), float("nan")))[0] == float("-inf")


def in_force() -> str:
    return torch.ops.lego_kernels.cpu_isa("")


needs_cpu_kernels = pytest.mark.skipif(
    bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
)


@needs_cpu_kernels
def test_use_cpu_isa_is_undone():
    before = in_force()
    with library.use_cpu_isa("scalar"):
        assert in_force() == "scalar"
        with library.use_cpu_isa("best"):
            assert in_force() == library.cpu_isas()[-1]
        assert in_force() == "scalar"
        assert library.cpu_isas()[0] == "scalar" and in_force() == "scalar"
    with pytest.raises(KeyError), library.use_cpu_isa("scalar"):
        raise KeyError
    assert in_force() == before


@needs_cpu_kernels
@pytest.mark.parametrize("unknown", ["nonsense", "AVX2", "avx512_bf16 "])
def test_unknown_name_changes_nothing(unknown):
    before = in_force()
    with pytest.raises(ValueError, match=rf"^cpu_isa: must be one that .*, got {unknown}$"):
        with library.use_cpu_isa(unknown):
            raise AssertionError
    assert in_force() == before


def imported(isa: str) -> subprocess.CompletedProcess:
    """Import lego_kernels in a process with that LEGO_CPU_ISA, and print what is in force."""
    code = "import torch, lego_kernels; print(torch.ops.lego_kernels.cpu_isa(''))"
    environment = os.environ | {"LEGO_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_cpu_kernels
def test_environment_names_the_instruction_set():
    done = imported("avx2")
    if "avx2" in library.cpu_isas():
        assert done.stdout.strip() == "avx2", done.stderr
    else:
        assert "got avx2" in done.stderr


@needs_cpu_kernels
def test_environment_with_nonsense_fails_the_import():
    done = imported("nonsense")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: cpu_isa: must be one that this CPU has, of scalar to ")
    assert last.endswith("got nonsense")
