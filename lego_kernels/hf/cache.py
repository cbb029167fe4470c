"""A cache for stock transformers models: preallocated, appended in place, and rolled back in O(1).

transformers has a dynamic cache, which copies all of itself for every token, and a static one,
which cannot be cropped, so assisted generation refuses it; see docs/export.md.
"""

# Shape letters: B = rows, H = key/value heads, T = new tokens, S = capacity, E = head width.

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lego_kernels.library import refuse_grad

_ATTENTION = {"full_attention", "sliding_attention"}


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values [B, H, S, E] of one layer, of which the first `length` slots are in use."""

    # the length is a Python number: a graph would be compiled anew for every token
    is_compileable = False
    # a window is the mask's matter: all slots are kept
    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the rows, heads, widths, dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.size(0)
        self.keys = _slots(key_states, self.capacity)
        self.values = _slots(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, E]; return views of all so far, [B, H, length, E].

        Raises: ValueError if they do not fit, RuntimeError if they require grad in grad mode;
            both before anything is changed.
        """
        refuse_grad("PreallocatedCache", key_states, value_states)
        end = self.length + key_states.size(2)
        if end > self.capacity:
            raise ValueError(
                f"PreallocatedCache: capacity must be >= the {end} tokens to hold, got "
                f"{self.capacity}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, new, held in (
            ("keys", key_states, self.keys),
            ("values", value_states, self.values),
        ):
            _check_like(name, new, held)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, tokens: int) -> None:
        """Forget the last -tokens tokens, or, with tokens > 0, all but the first tokens.

        transformers 5.0 counts what is left and later versions what goes, which are never positive:
        both are served. Nothing is copied.
        Raises: ValueError if there are fewer tokens than shall go.
        """
        if -tokens > self.length:
            raise ValueError(
                f"PreallocatedCache: crop must remove at most {self.length} tokens, got {-tokens}"
            )
        self.length = min(tokens, self.length) if tokens > 0 else self.length + tokens

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that the next update returns.

        query: Number of new tokens; transformers 5.0 gives their positions instead.
        """
        new = query if isinstance(query, int) else query.size(0)
        return self.length + new, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    # what transformers 5.0 calls it
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row b the tokens of row beam_idx[b], int64 [B], in place."""
        for held in (self.keys, self.values):
            if held is not None:
                used = held[:, :, : self.length]
                used.copy_(used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _fixed_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _fixed_rows()


class PreallocatedCache(Cache):
    """`past_key_values` of a stock decoder, for at most `capacity` tokens a row.

    Memory is taken once, at the first forward, for as many rows as that one has. Serves
    generate(), assisted generation, beam search, and whoever calls crop(): rolling back is O(1).
    Under sliding-window attention it keeps all tokens, and the mask alone does the window.
    Raises: ValueError if a layer of the model is no plain attention.
    """

    def __init__(self, config: Any, *, capacity: int) -> None:
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or _ATTENTION)
        if not kinds <= _ATTENTION or getattr(text, "num_kv_shared_layers", None):
            raise ValueError(
                "PreallocatedCache: layers must have full or sliding attention with keys of their "
                f"own, got {', '.join(sorted(kinds))} in {text.model_type}"
            )
        if capacity < 1:
            raise ValueError(f"PreallocatedCache: capacity must be >= 1, got {capacity}")
        super().__init__(
            layers=[PreallocatedLayer(capacity) for _ in range(text.num_hidden_layers)]
        )


def _slots(states: Tensor, capacity: int) -> Tensor:
    B, H, _, E = states.shape
    return states.new_empty(B, H, capacity, E)


def _check_like(name: str, new: Tensor, held: Tensor) -> None:
    wanted = (*held.shape[:2], new.size(2), held.size(3))
    if new.shape != wanted or new.dtype != held.dtype or new.device != held.device:
        raise ValueError(
            f"PreallocatedCache: {name} must be {wanted}, {held.dtype} on {held.device}, as at "
            f"first, got {tuple(new.shape)}, {new.dtype} on {new.device}"
        )


def _fixed_rows() -> NotImplementedError:
    return NotImplementedError(
        "PreallocatedCache: the number of rows must stay what it was at first, got another; start "
        "with all rows"
    )
