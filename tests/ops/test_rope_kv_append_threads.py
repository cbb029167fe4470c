"""rope_kv_append on several threads, which share its tokens."""

import pytest
import torch

from lego_kernels.ops.rope_kv_append import rope_kv_append
from tests.oracle import FLOORS, assert_same_bits
from tests.rope_kv_append_cases import WRITTEN, Shape, check, make

pytestmark = pytest.mark.threads
# 320 tokens of 768 values: 15 threads' worth
MANY_TOKENS = Shape(B=8, T=40, S=90, P=120, Hq=8, Hkv=2, E=64)


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_threads_write_what_one_thread_writes(dtype):
    arguments = make(MANY_TOKENS, dtype, norm=True, layout="strided")
    alone = make(MANY_TOKENS, dtype, norm=True, layout="strided")
    check(rope_kv_append, arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rope_kv_append(**alone)
    finally:
        torch.set_num_threads(before)
    for name in WRITTEN:
        assert_same_bits(arguments[name], alone[name])
