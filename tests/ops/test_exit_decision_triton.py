"""The Triton kernels of exit_decision: compiled for GPUs that are not here, and by parts."""

from functools import partial

import pytest
import torch

import lego_kernels.ops.exit_decision as op
from lego.ops.gumbel import gumbel
from tests.exit_decision_cases import check, inputs
from tests.oracle import random
from tests.triton_compile import ARCHITECTURES, Compiled, Spec, compile_specs

triton = pytest.importorskip("triton")
tl = triton.language
kernels = pytest.importorskip("lego_kernels.triton.exit_decision")

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
INTEGERS = ["B", "D", "vocab_size", "num_tiles", "h_stride", "head_stride"]
INTEGERS += ["temperature_stride", "seed_stride", "offset_stride"]
# what the launcher takes; compiling one takes 2 to 3 s
FORMS = {80: [("fp16", "dot"), ("fp32", "gemv")], 90: [("bf16", "dot"), ("fp32", "gemv")]}


def tile_spec(dtype: str, form: str, arch: int, *, aligned: bool = True) -> Spec:
    """With the norm and with sampling, as the launcher would compile it for a multiple of 16."""
    use_dot, rows = kernels.FORMS[form]
    tensors = dict.fromkeys(["h_ptr", "head_ptr", "norm_weight_ptr"], f"*{dtype}")
    tensors |= {"temperature_ptr": "*fp32", "seed_ptr": "*i64", "offset_ptr": "*i64"}
    return Spec(
        kernel="lego_kernels.triton.exit_decision:_exit_decision_tile_kernel",
        signature=tensors
        | {"workspace_ptr": "*fp32", "eps": "fp32"}
        | dict.fromkeys(INTEGERS, "i32"),
        constexprs={
            "USE_DOT": use_dot,
            "ROWS": rows,
            "TILE": kernels.TILE,
            "BLOCK_D": kernels.BLOCK_D[form, BYTES[dtype]],
            "STAGES": kernels.STAGES,
        },
        divisible=("D", "h_stride", "head_stride") if aligned else (),
        arch=arch,
    )


def wide_copies(compiled: Compiled) -> int:
    """Asynchronous copies of 16 bytes by each thread, which is how the head streams in."""
    lines = compiled.ptx.splitlines()
    return sum("cp.async.cg.shared.global" in line and "0x10" in line for line in lines)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tile_kernel_compiles_without_spills(arch):
    every = compile_specs([tile_spec(*form, arch) for form in FORMS[arch]])
    for (dtype, form), compiled in zip(FORMS[arch], every, strict=True):
        assert compiled.stack_bytes == 0, (dtype, form)
        # 65,536 registers are for 3 programs of 128 threads
        assert compiled.registers <= 168, (dtype, form)
        # by 128 threads, of the head alone
        stage_bytes = kernels.TILE * kernels.BLOCK_D[form, BYTES[dtype]] * BYTES[dtype]
        assert wide_copies(compiled) >= kernels.STAGES * stage_bytes // (16 * 128), (dtype, form)
        # below 200; 785 where the lanes of a warp hold single columns and add them up in the loop
        assert compiled.ptx.count("shfl.") < 400, (dtype, form)
        assert ("mma.sync" in compiled.ptx) == (form == "dot")
        assert "tf32" not in compiled.ptx
        # off by 2^-22 near 1, where the noise of small words needs 2^-46
        assert "lg2.approx" not in compiled.ptx


def test_unaligned_rows_have_no_vector_loads():
    (compiled,) = compile_specs([tile_spec("bf16", "dot", 90, aligned=False)])
    assert wide_copies(compiled) == 0 and compiled.vector_loads == 0


def test_merge_kernel_compiles_without_spills():
    integers = dict.fromkeys(["B", "num_tiles", "threshold_stride"], "i32")
    floats = ["workspace_ptr", "threshold_ptr", "confidence_ptr", "lse_ptr"]
    given = {
        "kernel": "lego_kernels.triton.exit_decision:_exit_decision_merge_kernel",
        "signature": {"token_ptr": "*i64", "exit_ptr": "*i1", "log_vocab_size": "fp32"}
        | integers
        | dict.fromkeys(floats, "*fp32"),
        # Llama 3 has 1,002 tiles
        "constexprs": {"CRITERION": "entropy", "SAMPLED": True, "BLOCK_T": 1024},
    }
    for compiled in compile_specs([Spec(**given, arch=arch) for arch in ARCHITECTURES]):
        assert compiled.stack_bytes == 0 and compiled.registers <= 128


@pytest.fixture
def interpreted() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("where there is a GPU, Triton does not run on the CPU")


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "dot"), (torch.float16, "gemv")], ids=str
)
def test_the_form_that_is_not_the_default(dtype, form, interpreted, monkeypatch):
    launch = partial(kernels.launch_exit_decision, form=form)
    monkeypatch.setattr(op, "_op", launch)
    weight = random((40,), dtype, "cpu", seed=2)
    noise = {"temperature": 1.0, "seed": 3, "offset": 4}
    check(*inputs((5, 40, 300), dtype, "cpu"), "entropy", weight, **noise)


@triton.jit
def _noise_kernel(seed_ptr, offset_ptr, word_ptr, noise_ptr, first_index, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, 128)
    seed, offset = tl.load(seed_ptr + row), tl.load(offset_ptr + row)
    word = kernels._words(seed, offset, first_index, ROWS, 128)
    place = row[:, None] * 128 + column[None, :]
    tl.store(word_ptr + place, word.to(tl.int64))
    tl.store(noise_ptr + place, kernels._gumbel(word))


def test_noise_is_that_of_the_reference(interpreted):
    seed, offset = torch.tensor([3, -5, 2**62, -1]), torch.tensor([0, 2**40 + 1, -(2**63), -1])
    word, noise = torch.empty(4, 128, dtype=torch.int64), torch.empty(4, 128)
    _noise_kernel[(1,)](seed, offset, word, noise, 512, ROWS=4)
    exact = gumbel(seed, offset, 640)[:, 512:]
    torch.testing.assert_close(noise.double(), exact, rtol=1e-6, atol=1e-6)
    # from the exact noise back to the word, all 32 bits of it
    u = -torch.expm1(-torch.exp(-exact))
    assert torch.equal(word, (u * 2.0**32 - 0.5).round().long())


@triton.jit
def _gumbel_kernel(word_ptr, noise_ptr):
    place = tl.arange(0, 16)
    word = tl.load(word_ptr + place).to(tl.uint32)
    tl.store(noise_ptr + place, kernels._gumbel(word))


def test_noise_of_the_rarest_words(interpreted):
    rare = [0, 1, 2, 77, 255, 256, 300, 2**16 + 1, 2**23 - 1, 2**24 + 1, 2**28 + 7, 2**31]
    word = torch.tensor([*rare, 2**32 - 9999, 2**32 - 129, 2**32 - 2, 2**32 - 1])
    exact = -(-torch.log1p(-(word.double() + 0.5) * 2.0**-32)).log()
    noise = torch.empty(16)
    _gumbel_kernel[(1,)](word, noise)
    torch.testing.assert_close(noise[:12].double(), exact[:12], rtol=3e-7, atol=1e-7)
    # the lowest noise, which hardly ever wins, is cut at -log(24 log 2)
    assert torch.all((noise[12:] >= exact[12:] - 1e-2) & (noise[12:] < -2.5))
