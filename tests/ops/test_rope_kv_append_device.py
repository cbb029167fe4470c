"""The device code of rope_kv_append, compiled for the host: all but the launch and the shuffles."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.oracle import FLOORS, assert_same_bits
from tests.rope_kv_append_cases import SHAPES, WRITTEN, Shape, check, expected, make

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="needs nvcc, which is not on PATH"
)
CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# what the kernel does, one thread after the other; returns the bytes of an access, or -1 where a
# mask is not that of the threads that share a head
PROGRAM = """
#include "rope_kv_append.cuh"
template <typename T, int N>
int run(lego::RopeKvAppendArgs args) {
  args.lanes = lego::rope_lanes(args.half / N);
  const int lanes = args.lanes;
  for (int thread = 0; thread < 256; ++thread) {
    uint32_t mask = 0;
    for (int other = thread / 32 * 32; other < thread / 32 * 32 + 32; ++other) {
      mask |= (other / lanes == thread / lanes ? 1u : 0u) << other % 32;
    }
    if (mask != lego::rope_lane_mask(thread, lanes)) return -1;
  }
  for (int64_t i = 0; i < args.B * args.T; ++i) {
    const lego::RopeToken token = lego::rope_token(args, i);
    if (token.table_row < 0) continue;
    for (int h = 0; h < args.Hq + 2 * args.Hkv; ++h) {
      const lego::RopeHead<T> head = lego::rope_head<T>(args, token, h);
      if (head.to == nullptr) continue;
      float squares = 0;
      for (int lane = 0; lane < lanes; ++lane) {
        squares += lego::rope_squares<N>(head.from, args.half, lane, lanes);
      }
      const float scale = lego::rope_scale(squares, args.half, args.eps);
      for (int lane = 0; lane < lanes; ++lane) {
        lego::rope_write<N>(args, token.table_row, head, scale, lane);
      }
    }
  }
  return N * sizeof(T);
}
template <typename T>
int run_widest(const lego::RopeKvAppendArgs& args) {
  return lego::rope_is_aligned(args, sizeof(T)) ? run<T, 16 / sizeof(T)>(args) : run<T, 1>(args);
}
extern "C" int rope(const lego::RopeKvAppendArgs* args, int dtype) {
  if (dtype == 0) return run_widest<float>(*args);
  return dtype == 1 ? run_widest<__nv_bfloat16>(*args) : run_widest<__half>(*args);
}
"""


class Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("row", "token", "head")
    ]


class Args(ctypes.Structure):
    _fields_ = [
        *((name, Heads) for name in ("q_out", "k_cache", "v_cache", "qkv")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("cos_stride", "sin_stride")),
        *((name, ctypes.c_void_p) for name in ("position", "slot")),
        *((name, ctypes.c_int64) for name in ("position_stride", "slot_stride")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("B", "T", "S", "P")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("Hq", "Hkv", "half", "lanes")),
    ]


def heads(x: torch.Tensor, E: int) -> Heads:
    strides = (*x.stride()[:2], x.stride(2) if x.dim() == 4 else E)
    sizes = (*x.shape[:3],) if x.dim() == 4 else (*x.shape[:2], 2)
    in_bytes = [s * x.element_size() * (n > 1) for s, n in zip(strides, sizes, strict=True)]
    return Heads(x.data_ptr(), *in_bytes)


@pytest.fixture(scope="module")
def rope(tmp_path_factory):
    """rope(**arguments) -> bytes of an access, on CPU tensors."""
    folder = tmp_path_factory.mktemp("rope")
    (folder / "rope.cu").write_text(PROGRAM)
    command = ["nvcc", "-O1", "-Xcompiler=-fPIC", "-shared", "-I", CSRC, "-o"]
    subprocess.run([*command, folder / "rope.so", folder / "rope.cu"], check=True)
    program = ctypes.CDLL(str(folder / "rope.so"))

    def run(q_out, k_cache, v_cache, qkv, cos, sin, position, slot, q_norm=None, k_norm=None):
        (B, T, Hq, E), (S, Hkv) = q_out.shape, k_cache.shape[1:3]
        args = Args(
            *(heads(x, E) for x in (q_out, k_cache, v_cache, qkv)),
            *(cos.data_ptr(), sin.data_ptr(), cos.stride(0), sin.stride(0)),
            *(position.data_ptr(), slot.data_ptr(), position.stride(0), slot.stride(0)),
            *(0 if x is None else x.data_ptr() for x in (q_norm, k_norm)),
            *(B, T, S, cos.size(0), 1e-5, Hq, Hkv, E // 2),
        )
        return program.rope(ctypes.byref(args), DTYPES[qkv.dtype])

    return run


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("layout", ["dense", "strided", "unaligned"])
def test_matches_reference(layout, dtype, norm, rope):
    widths = []
    # more than a warp's worth of chunks, too
    for shape in [*SHAPES, Shape(E=600)]:
        arguments = make(shape, dtype, norm=norm, layout=layout)
        check(lambda **given: widths.append(rope(**given)), arguments)
    narrow = torch.empty(0, dtype=dtype).element_size()
    wide = narrow if layout == "unaligned" else 16
    assert widths[:3] == [narrow] * 3 and widths[3:5] == [wide] * 2


def test_accesses_are_wide_where_every_address_allows(rope):
    shape = Shape(B=1, T=1, E=32)
    assert rope(**make(shape, torch.bfloat16, norm=True)) == 16
    for name in ("q_out", "k_cache", "qkv", "cos", "sin", "q_norm", "k_norm"):
        arguments = make(shape, torch.bfloat16, norm=True)
        x = arguments[name]
        flat = torch.zeros(x.numel() + 2, dtype=x.dtype)
        arguments[name] = flat[2:].view(x.shape)
        assert rope(**arguments) == 2, name
    for dim in range(3):  # rows, tokens or heads are an odd number of elements apart
        arguments = make(Shape(E=32), torch.bfloat16)
        strides = [s + (d == dim) for d, s in enumerate((4096, 256, 64))]
        memory = torch.zeros(2**15, dtype=torch.bfloat16)
        arguments["k_cache"] = memory.as_strided((3, 6, 2, 32), (*strides, 1))
        assert rope(**arguments) == 2, strides
    arguments = make(shape, torch.bfloat16)
    arguments["cos"] = torch.zeros(9, 17)[:, :16]  # rows are 68 bytes apart
    assert rope(**arguments) == 2


@pytest.mark.parametrize(("name", "bad"), [("position", -1), ("position", 8), ("slot", 5)])
@pytest.mark.parametrize("far", [0, 2**62])
def test_row_out_of_range_is_not_written(name, bad, far, rope):
    arguments = make()
    arguments["slot"][1] = 1
    before = {written: arguments[written].clone() for written in WRITTEN}
    good = expected(arguments)
    arguments[name][1] = bad - far if bad < 0 else bad + far
    rope(**arguments)
    for written in WRITTEN:
        assert_same_bits(arguments[written][1], before[written][1])
        torch.testing.assert_close(arguments[written][::2], good[written][::2])
