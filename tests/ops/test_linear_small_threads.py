"""linear_small on several threads gives the bits that it gives on one."""

import pytest
import torch

from lego_kernels.ops.linear_small import linear_small
from tests.oracle import FLOORS, assert_same_bits, random

pytestmark = pytest.mark.threads


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    x, w = random((3, 300), dtype, "cpu"), random((2001, 300), dtype, "cpu", seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear_small(x, w)
        torch.set_num_threads(4)
        for _ in range(20):
            assert_same_bits(linear_small(x, w), alone)
    finally:
        torch.set_num_threads(before)
