"""Tiny models with strong random weights, and hooks that count what really runs in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lego.config import Criterion, KVPolicy, ModelConfig, UpperKV
from lego.counts import Counts
from lego.generation import GenerationOutput, generate
from lego.model import LegoModel
from lego.strategies import EarlyExit, Strategy

VOCAB = 50
CRITERIA: tuple[Criterion, ...] = ("max_prob", "margin", "entropy", "gate")
# which models a policy serves
POLICIES: dict[KVPolicy, UpperKV] = {
    "exact": "exit_state",
    "recompute": "own",
    "propagate": "own",
    "hole": "own",
}
# one shape for every switch of ModelConfig; all have grouped queries but the first
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_kv_heads": 4},
    "gqa": {},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True, "num_kv_heads": 1},
    "all": {"qk_norm": True, "qkv_bias": True, "tie_embeddings": False, "num_layers": 5},
    "shallow": {"exit_layer": 1, "num_layers": 4, "tie_embeddings": False},
}


def tiny_config(upper_kv: UpperKV = "exit_state", **changes: Any) -> ModelConfig:
    small = {
        "vocab_size": VOCAB,
        "dim": 32,
        "num_layers": 4,
        "exit_layer": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim": 24,
        "max_seq_len": 64,
    }
    return ModelConfig(upper_kv=upper_kv, **(small | changes))


def tiny_model(
    upper_kv: UpperKV = "exit_state",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> LegoModel:
    """A model whose layers all matter: at the usual std of 0.02 every distribution is flat."""
    model = LegoModel(tiny_config(upper_kv, **changes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 2:
            gain = 2.5 if name.startswith(("embedding", "head", "gate")) else 1.5
            values *= gain * parameter.size(1) ** -0.5
        else:
            values = values * 0.3 + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(values)
    return model.requires_grad_(False)


def agreeing_model(upper_kv: UpperKV = "exit_state", *, share: float, **changes: Any) -> LegoModel:
    """A tiny model whose upper block adds `share` of what it would: at 0 both exits agree."""
    model = tiny_model(upper_kv, **changes)
    for block in model.upper:
        block.attention.o_proj.weight *= share
        block.mlp.down_proj.weight *= share
    model.final_norm.weight.copy_(model.exit_norm.weight)
    return model


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def model_for(policy: KVPolicy, **changes: Any) -> LegoModel:
    return tiny_model(POLICIES[policy], **changes)


def midway(values: Tensor | list[float], share: float = 0.5) -> float:
    """A threshold that about `share` of the values reach, in the middle of a wide gap."""
    descending = torch.as_tensor(values, dtype=torch.float64).flatten().sort(descending=True).values
    count = round(share * (len(descending) - 1))
    near = range(max(count - 2, 1), min(count + 3, len(descending)))
    best = max(near, key=lambda i: float(descending[i - 1] - descending[i]))
    assert descending[best - 1] - descending[best] > 1e-4
    return float(descending[best - 1] + descending[best]) / 2


def early_exit(
    model: LegoModel,
    policy: KVPolicy,
    criterion: Criterion = "max_prob",
    *,
    ids: Tensor | None = None,
    share: float = 0.5,
) -> EarlyExit:
    """A strategy under which about `share` of the tokens `ids`, or of random ones, exit."""
    ids = token_ids(4, 20, seed=9) if ids is None else ids
    scores = confidence(model, model(ids).exit_state, criterion)
    return EarlyExit(threshold=midway(scores, share), criterion=criterion, kv_policy=policy)


def confidence(model: LegoModel, exit_state_ND: Tensor, criterion: Criterion) -> Tensor:
    """Confidence [N] from the definitions of the criteria, apart from lego.ops."""
    normed = exit_state_ND * model.exit_norm.weight
    normed = normed / (exit_state_ND.square().mean(-1, keepdim=True) + model.exit_norm.eps).sqrt()
    if criterion == "gate":
        return 1 / (1 + (-(normed @ model.gate.weight[0] + model.gate.bias)).exp())
    exp = (normed @ model.head.weight.T).exp()
    prob = exp / exp.sum(-1, keepdim=True)
    first, second = prob.sort(descending=True).values[..., :2].unbind(-1)
    if criterion == "max_prob":
        return first
    if criterion == "margin":
        return first - second
    V = torch.tensor(prob.size(-1), dtype=prob.dtype)
    return 1 + (prob * prob.log()).sum(-1) / V.log()


@dataclass
class Watched:
    """Tokens that passed each module, and how often it was called."""

    lower: list[int]
    upper: list[int]
    upper_kv: list[int]  # tokens whose K/V were projected apart, by layer
    head: int = 0
    gate: int = 0
    lower_passes: int = 0
    upper_passes: int = 0
    upper_kv_passes: int = 0
    head_passes: int = 0
    gate_passes: int = 0

    @property
    def nothing(self) -> bool:
        return not any((*self.lower, *self.upper, *self.upper_kv, self.head, self.gate))


@contextmanager
def watch(model: LegoModel) -> Iterator[Watched]:
    """Count with hooks on the modules themselves, independently of lego.decoding.Counts."""
    seen = Watched(
        lower=[0] * len(model.lower), upper=[0] * len(model.upper), upper_kv=[0] * len(model.upper)
    )

    def count_block(of: str, layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            getattr(seen, of)[layer] += args[0][..., 0].numel()
            setattr(seen, f"{of}_passes", getattr(seen, f"{of}_passes") + 1)

        return hook

    def count_head(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.head += args[0][..., 0].numel()
        seen.head_passes += 1

    def count_kv_proj(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.upper_kv = [n + args[0][..., 0].numel() for n in seen.upper_kv]
        seen.upper_kv_passes += 1

    def count_gate(score: Any) -> Any:
        def counted(state: Tensor) -> Tensor:
            seen.gate += len(state)
            seen.gate_passes += 1
            return score(state)

        return counted

    def count_project_kv(project: Any, layer: int) -> Any:
        def counted(x: Tensor, *rest: Any) -> Any:
            seen.upper_kv[layer] += x[..., 0].numel()
            seen.upper_kv_passes += layer == 0  # one pass over the projections of all layers
            return project(x, *rest)

        return counted

    with ExitStack() as stack:
        hooks = [model.head.register_forward_pre_hook(count_head)]
        for of, blocks in (("lower", model.lower), ("upper", model.upper)):
            for layer, block in enumerate(blocks):
                hooks.append(block.register_forward_pre_hook(count_block(of, layer)))
        if hasattr(model, "upper_kv_proj"):
            hooks.append(model.upper_kv_proj.register_forward_pre_hook(count_kv_proj))
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(patch.object(model, "gate_score", count_gate(model.gate_score)))
        for layer, block in enumerate(model.upper):
            attention = block.attention
            counted = count_project_kv(attention.project_kv, layer)
            stack.enter_context(patch.object(attention, "project_kv", counted))
        yield seen


def assert_counted(counts: Counts, seen: Watched) -> None:
    """GenerationStats against hooks on the modules."""
    assert counts.lower_layer_calls == sum(seen.lower)
    assert counts.upper_layer_calls == sum(seen.upper)
    assert len(set(seen.upper)) == len(set(seen.lower)) == len(set(seen.upper_kv)) == 1
    assert counts.upper_kv_calls == seen.upper_kv[0]
    for part in ("head", "gate"):
        assert getattr(counts, f"{part}_calls") == getattr(seen, part)
    for part in ("lower", "upper", "upper_kv", "head", "gate"):
        assert getattr(counts, f"{part}_passes") == getattr(seen, f"{part}_passes"), part


def generate_watched(
    model: LegoModel, prompts: Any, num_new: int, strategy: Strategy, **options: Any
) -> tuple[GenerationOutput, Watched, Watched]:
    """The output, and what ran in prefill and in both together."""
    with watch(model) as in_prefill:
        generate(model, prompts, 0, strategy, **options)
    with watch(model) as in_all:
        output = generate(model, prompts, num_new, strategy, **options)
    assert_counted(output.stats.prefill, in_prefill)
    assert_counted(output.stats.prefill + output.stats.decode, in_all)
    return output, in_prefill, in_all
