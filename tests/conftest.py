import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so before any test module imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread but for modules marked `threads`: on a busy machine, threads that wait for each
    other over tiny matrices made test_decoding take 240 s instead of 9 s."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("threads") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()  # several processes may share one GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
