"""DeviceDecoder in CUDA graphs, against itself without them and against the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lego_kernels.decoder import graph_step
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.device_decoder import DeviceDecoder
from lego_kernels.decoder.graph_step import MODES
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights
from tests.device_decoder_cases import SLOTS, alike, prompts, run, same, setup
from tests.models import CRITERIA

pytestmark = pytest.mark.gpu


def on_gpu(weights: DecoderWeights) -> DecoderWeights:
    """A copy on the GPU: of layers and other parts too."""

    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.cuda()
        if isinstance(part, tuple):
            return tuple(map(moved, part))
        names = getattr(part, "__dataclass_fields__", ())
        return (
            replace(part, **{name: moved(getattr(part, name)) for name in names}) if names else part
        )

    return moved(weights)


def test_if_nodes_work():
    assert graph_step.conditional_problem(torch.device("cuda", 0)) == ""


@pytest.mark.parametrize("mode", ["conditional", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", [None, *CRITERIA])
def test_graphs_give_what_plain_calls_give(criterion, dtype, mode):
    weights, threshold = setup(criterion or "max_prob", dtype)
    options = {"threshold": threshold, "criterion": criterion, "max_pending": 3}
    options = options if criterion else {}
    weights = on_gpu(weights)
    decoders = [DeviceDecoder(weights, 3, SLOTS, mode=m, **options) for m in ("host_branch", mode)]
    expected, got = map(run, decoders)
    assert same(got, expected)
    assert decoders[1].counts == decoders[0].counts


def test_gpu_gives_what_the_cpu_gives():
    """In float32, with no token near the threshold: the last bits differ."""
    weights, threshold = setup()
    expected = run(Decoder(weights, 3, SLOTS, threshold=threshold))
    got = run(DeviceDecoder(on_gpu(weights), 3, SLOTS, threshold=threshold))
    assert alike(got, expected)


@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_sampled_full_depth_in_a_graph(upper_kv):
    weights = on_gpu(setup(upper_kv=upper_kv).weights)
    sampling = Sampling(temperature=0.9, seed=7)
    got, expected = (
        run(DeviceDecoder(weights, 3, SLOTS, sampling=sampling, mode=mode))
        for mode in ("conditional", "host_branch")
    )
    assert same(got, expected)


def test_top_k_takes_the_host_branch():
    weights = on_gpu(setup().weights)
    decoder = DeviceDecoder(weights, 1, 8, sampling=Sampling(temperature=1.0, top_k=3))
    assert decoder.mode == "host_branch"
    assert decoder.why_mode.count("top_k and top_p allocate") == 2


@pytest.mark.parametrize("criterion", [None, "max_prob", "gate"])
def test_launch_neither_waits_nor_allocates(criterion):
    weights, threshold = setup(criterion or "max_prob")
    options = {"threshold": threshold, "criterion": criterion} if criterion else {}
    decoder = DeviceDecoder(on_gpu(weights), 3, SLOTS, **options)
    assert decoder.mode == MODES[0], decoder.why_mode
    decoder.prefill(prompts())
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.launch()
        decoder.finish([1])
        decoder.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert [len(decoder.collect()) for _ in range(2)] == [2, 2]


def test_parts_of_a_step_allocate_nothing():
    weights, threshold = setup()
    decoder = DeviceDecoder(on_gpu(weights), 3, SLOTS, threshold=threshold, mode="host_branch")
    decoder.prefill(prompts())
    decoder.step()
    for part in (decoder._before, decoder._fill, decoder._deep, decoder._after):
        part()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        part()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, part.__name__
