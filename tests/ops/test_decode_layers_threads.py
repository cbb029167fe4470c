"""decode_layers on several threads gives the bits that it gives on one."""

import pytest
import torch

from lego_kernels import library
from tests.decode_layers_cases import Case, Shape, chunk
from tests.oracle import FLOORS, assert_same_bits

pytestmark = [
    pytest.mark.threads,
    pytest.mark.skipif(
        bool(library.NOT_LOADED["CPU"]), reason=f"CPU kernels: {library.NOT_LOADED['CPU']}"
    ),
]
# every loop of the op has parts enough for two threads
WIDE = {"D": 512, "H": 8, "E": 64, "F": 700, "L": 1, "S": 400, "P": 400}


def run(shape, dtype):
    case = Case(shape, dtype)
    tokens = chunk(*((n % 3, 350 + n // 3) for n in range(50)))
    return [case.run(tokens), *case.written()]


@pytest.mark.parametrize("form", [{}, {"own_kv": False}, {"kv_only": True}], ids=str)
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_same_bits_on_any_number_of_threads(dtype, form):
    shape, before = Shape(**WIDE, **form), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(shape, dtype)
        torch.set_num_threads(4)
        for _ in range(3):
            for got, expected in zip(run(shape, dtype), alone, strict=True):
                assert_same_bits(got, expected)
    finally:
        torch.set_num_threads(before)
