"""The Triton kernels of decode_attention, compiled for GPUs that need not be here."""

from tests.triton_compile import ARCHITECTURES, Spec, compile_specs

INTS = "T S Hkv Hq group E split_slots".split()
STRIDES = [
    f"{x}_stride_{i}" for x, dims in zip("qkv", ("bth", "bsh", "bsh"), strict=True) for i in dims
]
OUT_STRIDES = [f"out_stride_{i}" for i in "bth"]
POINTERS = {"kv_len_ptr": "*i64", "workspace_ptr": "*fp32", "scale": "fp32"}


def attention_spec(dtype, E, splits, arch) -> Spec:
    ints = [name for name in INTS if name != "Hq"] + STRIDES + OUT_STRIDES
    tensors = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "out_ptr"], f"*{dtype}")
    return Spec(
        kernel="lego_kernels.triton.decode_attention:_decode_attention_kernel",
        signature=tensors | POINTERS | dict.fromkeys(ints, "i32"),
        constexprs={"SPLITS": splits, "BLOCK_M": 16, "BLOCK_S": min(64, 4096 // E), "BLOCK_E": E},
        divisible=("E", "split_slots", *STRIDES, *OUT_STRIDES),
        arch=arch,
    )


def merge_spec(arch) -> Spec:
    pointers = {"workspace_ptr": "*fp32", "kv_len_ptr": "*i64", "out_ptr": "*bf16"}
    return Spec(
        kernel="lego_kernels.triton.decode_attention:_merge_splits_kernel",
        signature=pointers | dict.fromkeys("T S Hq E split_slots".split() + OUT_STRIDES, "i32"),
        constexprs={"SPLITS": 64, "BLOCK_SPLITS": 64, "BLOCK_E": 256},
        divisible=("E", "split_slots", *OUT_STRIDES),
        arch=arch,
    )


def test_ahead_of_time():
    specs = [merge_spec(arch) for arch in ARCHITECTURES]
    specs += [attention_spec("bf16", 64, 16, arch) for arch in ARCHITECTURES]
    specs += [attention_spec("fp32", 256, 1, arch) for arch in ARCHITECTURES]
    for spec, compiled in zip(specs, compile_specs(specs), strict=True):
        assert compiled.stack_bytes == 0 and compiled.vector_loads > 0, spec
