"""How every op is timed: `measure` runs one provider and notes bytes and speed beside the time."""

from collections.abc import Callable

import pytest
import torch

from tests.conftest import pytest_collection_modifyitems

__all__ = ["measure", "pytest_collection_modifyitems"]  # the latter skips what needs a GPU

CALLS = 100  # per timed round, so that neither the timer nor one synchronisation counts


@pytest.fixture
def measure(benchmark):
    """Time call() on one CPU thread, since a second one on a shared machine swings 5x."""

    def run(call: Callable[[], object], *, device: str, moved_bytes: int) -> None:
        def round_of_calls() -> None:
            for _ in range(CALLS):
                call()
            if device == "cuda":
                torch.cuda.synchronize()

        round_of_calls()
        benchmark(round_of_calls)
        seconds = benchmark.stats.stats.median / CALLS if benchmark.enabled else float("nan")
        benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
            "torch": torch.__version__,
            "bytes": moved_bytes,
            "us_per_call": seconds * 1e6,
            "gb_per_s": moved_bytes / seconds / 1e9,
        }

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(num_threads)
