"""A generated text whose tokens are marked by the layer they left at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lego.generation import GeneratedToken
from lego.terminal import ShadedText
from lego.tokenizer import Tokenizer

# control characters have no place in a page: their pictures stand for them
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | {0x7F: 0x2421}
_NAMES = {" ": "space", "\n": "line break", "\t": "tab"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One generated token. name is what to say where the text alone says nothing."""

    text: str
    name: str
    exit_layer: int
    shallow: bool
    confidence: float | None  # None if nothing was decided


@dataclass(frozen=True, kw_only=True)
class ExitMap:
    """A prompt, and a mark for every token generated from it."""

    prompt: str
    marks: list[Mark]
    exit_layer: int
    num_layers: int

    @property
    def num_shallow(self) -> int:
        return sum(mark.shallow for mark in self.marks)


def exit_map(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: Sequence[GeneratedToken],
    *,
    exit_layer: int,
    num_layers: int,
) -> ExitMap:
    """A mark for each token; the texts joined are the generated text.

    A token that holds the beginning of a character has no text: the one that ends it has.
    """
    shaded = ShadedText(tokenizer, num_layers, prompt)
    marks = []
    for new in tokens:
        text = printable(shaded.piece(new).plain)
        mark = Mark(
            text=text,
            name=_name(text),
            exit_layer=new.exit_layer,
            shallow=new.exit_layer < num_layers,
            confidence=None if math.isnan(new.confidence) else new.confidence,
        )
        marks.append(mark)
    return ExitMap(
        prompt=printable(tokenizer.decode(prompt)),
        marks=marks,
        exit_layer=exit_layer,
        num_layers=num_layers,
    )


def printable(text: str) -> str:
    """Control characters as their pictures."""
    return text.translate(_PICTURES)


def _name(text: str) -> str:
    """`3 spaces`, `line break, 2 spaces`; empty where the text can be read out."""
    if not text:
        return "part of a character"
    if not set(text) <= _NAMES.keys():
        return ""
    names: list[str] = []
    start = 0
    while start < len(text):
        run = len(text[start:]) - len(text[start:].lstrip(text[start]))
        name = _NAMES[text[start]]
        names.append(name if run == 1 else f"{run} {name}s")
        start += run
    return ", ".join(names)
