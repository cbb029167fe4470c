"""compact: the reference against a loop, and the kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.compact import compact as reference
from lego_kernels.ops.compact import compact
from tests.oracle import DEVICES, NEEDS_NVCC, run_on_host

OP = "compact"
BOTH = pytest.mark.parametrize("op", [reference, compact], ids=["reference", "wrapper"])
# none, one, a warp, one over it, one over a block of 256 threads, many blocks' worth
SIZES = [0, 1, 32, 33, 257, 5000]


def flags(B: int, share: float, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(B, generator=generator) < share).to(device)


def check(exit, alive) -> None:
    rows = [b for b in range(exit.numel()) if alive[b] and not exit[b]]
    wanted = rows + [-1] * (exit.numel() - len(rows))
    out = (torch.full(exit.shape, 77, device=exit.device), torch.tensor(77, device=exit.device))
    results = (reference(exit, alive), compact(exit, alive), compact(exit, alive, out=out))
    for index, count in results:
        assert index.dtype == count.dtype == torch.int64
        assert index.tolist() == wanted and count.item() == len(rows)
        assert index.device == count.device == exit.device and count.shape == ()
    assert index is out[0] and count is out[1]


@pytest.mark.parametrize("B", SIZES)
def test_matches_a_loop(B, device):
    for exit_share, alive_share in ((0.5, 0.7), (0, 1), (1, 1), (0, 0)):
        check(flags(B, exit_share, device, 0), flags(B, alive_share, device, 1))


def test_any_stride(device):
    wide = flags(400, 0.5, device, 0)
    check(wide[::4], wide[1::4])
    check(wide[:9], torch.ones((), dtype=torch.bool, device=device).expand(9))
    check(wide.view(100, 4)[:, 3], wide.view(4, 100)[2])


def test_out_of_any_layout(device):
    """count may be an element and index a part of a larger tensor, of which the rest stays."""
    memory = torch.full((8,), 77, device=device)
    alive = torch.tensor([True, False, True, True], device=device)
    compact(torch.zeros_like(alive), alive, out=(memory[2:6], memory[7]))
    assert memory.tolist() == [77, 77, 0, 2, 3, -1, 77, 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300), st.integers(1, 3))
def test_any_flags(pairs, stride):
    both = torch.tensor(pairs, dtype=torch.bool).view(-1, 2)
    check(both[::stride, 0], both[::stride, 1])


FLAG, NUMBER = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
BROKEN = {
    r"exit must be \[B\], got \(1, 3\)": (FLAG[None], FLAG),
    r"exit must be \[B\], got \(\)": (FLAG[0], FLAG[0]),
    r"alive must be \(3,\), got \(2,\)": (FLAG, FLAG[:2]),
    r"alive must be \(3,\), got \(3, 1\)": (FLAG, FLAG[:, None]),
    r"exit must be torch.bool, got torch.int64": (NUMBER, FLAG),
    r"alive must be torch.bool, got torch.uint8": (FLAG, FLAG.byte()),
    r"alive must be on cpu, got meta": (FLAG, FLAG.to("meta")),
}
BROKEN_OUT = {
    r"index must be \(3,\), got \(2,\)": (NUMBER[:2], NUMBER[0]),
    r"index must be torch.int64, got torch.int32": (NUMBER.int(), NUMBER[0]),
    r"index must have last stride 1, got \(2,\)": (torch.zeros(6).long()[::2], NUMBER[0]),
    r"count must be \(\), got \(1,\)": (NUMBER, NUMBER[:1]),
    r"count must be torch.int64, got torch.float32": (NUMBER, torch.zeros(())),
    r"count must be on cpu, got meta": (NUMBER, NUMBER[0].to("meta")),
}


@BOTH
@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence, op):
    with pytest.raises(ValueError, match=f"^compact: {sentence}"):
        op(*BROKEN[sentence])


@pytest.mark.parametrize("sentence", BROKEN_OUT)
def test_refuses_out(sentence):
    with pytest.raises(ValueError, match=f"^compact: {sentence}"):
        compact(FLAG, FLAG, out=BROKEN_OUT[sentence])
    assert not NUMBER.any()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    exit, alive = flags(9, 0.5, device, 0), flags(18, 0.5, device, 1)[::2]
    out = (torch.empty(9, dtype=torch.int64, device=device), torch.tensor(0, device=device))
    torch.library.opcheck(torch.ops.lego_kernels.compact.default, (exit, alive, *out))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    @torch.compile(fullgraph=True)
    def step(score, alive):
        index, count = compact(score > 0.5, alive)
        return index + 1, count + 1

    score = torch.tensor([0.1, 0.9, 0.2, 0.3], device=device)
    alive = torch.tensor([True, True, False, True], device=device)
    index, count = step(score, alive)
    assert index.tolist() == [1, 4, 0, 0] and count.item() == 3


@pytest.mark.gpu
def test_cuda_graph_capture():
    exit, alive = flags(300, 0.5, "cuda", 0), flags(300, 0.5, "cuda", 1)
    out = compact(exit, alive)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact(exit, alive, out=out)
    exit.logical_not_()
    graph.replay()
    assert [x.tolist() for x in out] == [x.tolist() for x in reference(exit, alive)]


# what the kernel does: a block's warps one after the other, then the next rows
HELPERS = """
#include <cassert>
#include <vector>
#include "compact.cuh"
void check(int64_t B, int exit_every, int alive_every) {
  std::vector<char> exit(2 * B + 1), alive(B + 1);
  std::vector<int64_t> index(B, 77), wanted;
  for (int64_t b = 0; b < B; ++b) {
    exit[2 * b] = b % exit_every == 0, alive[b] = b % alive_every == 0;
    if (alive[b] && !exit[2 * b]) wanted.push_back(b);
  }
  const auto *exits = reinterpret_cast<bool*>(exit.data());
  const auto *lives = reinterpret_cast<bool*>(alive.data());
  const lego::CompactArgs args{exits, lives, 2, 1, index.data(), nullptr, B};
  size_t found = 0;
  for (int64_t start = 0; start < B; start += 32 * lego::kCompactWarps) {
    uint32_t going_on[lego::kCompactWarps] = {};
    int rows_of_warp[lego::kCompactWarps];
    for (int w = 0; w < lego::kCompactWarps; ++w) {
      for (int lane = 0; lane < 32; ++lane) {
        going_on[w] |= uint32_t{lego::compact_goes_on(args, start + 32 * w + lane)} << lane;
      }
      rows_of_warp[w] = lego::compact_bits(going_on[w]);
    }
    for (int thread = 0; thread < 32 * lego::kCompactWarps; ++thread) {
      const int w = thread / 32, lane = thread % 32;
      if ((going_on[w] >> lane & 1) == 0) continue;
      const int before = lego::compact_before(rows_of_warp, w);
      index[found + before + lego::compact_rank(going_on[w], lane)] = start + thread;
    }
    found += lego::compact_before(rows_of_warp, lego::kCompactWarps);
  }
  assert(found == wanted.size());
  for (size_t i = 0; i < found; ++i) assert(index[i] == wanted[i]);
}
int main() {
  for (int64_t B : {0, 1, 31, 32, 33, 255, 256, 257, 5000}) {
    check(B, 2, 1), check(B, 3, 2), check(B, 1, 1), check(B, 7, 1);
  }
}
"""


@NEEDS_NVCC
def test_device_helpers_on_the_host(tmp_path):
    run_on_host(HELPERS, tmp_path)
