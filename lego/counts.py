"""What decoding calls, counted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Counts:
    """Calls actually made, counted where they are made. A layer call is one layer on one token.

    *_passes count how often a weight was read from memory: once a call, however many tokens share
    it. kv_slots counts cache slots read, over layers.
    """

    lower_layer_calls: int = 0
    upper_layer_calls: int = 0
    upper_kv_calls: int = 0  # tokens whose upper K/V were projected apart from a layer call
    head_calls: int = 0
    gate_calls: int = 0
    lower_passes: int = 0
    upper_passes: int = 0
    upper_kv_passes: int = 0
    head_passes: int = 0
    gate_passes: int = 0
    kv_slots: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        )
