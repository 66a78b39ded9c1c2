"""The word-level prompt encoder of the tiny preset: a fixed vocabulary and a small transformer.

Every word of a prompt is understood (through the table of synonyms), silent (articles and the
like) or ignored. Silent and ignored words never reach the encoder, so free wording degrades to
what was understood of it. The order of the understood words is kept: it says which colour belongs
to the background.

Shapes: B batch, L words (text_len), D width (text_dim).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_ray.config import require
from echo_ray.preset import WordTextShape

PADDING = "<pad>"

# The position in this tuple is the word's id in the weights: append, never reorder.
VOCABULARY: tuple[str, ...] = (
    PADDING,
    *("red", "green", "blue", "yellow", "magenta", "cyan"),
    *("black", "white", "gray"),
    *("ball", "square", "triangle"),
    *("small", "big", "slowly", "quickly"),
    *("moving", "and", "on", "background", "empty", "back"),
)
IDS: dict[str, int] = {word: i for i, word in enumerate(VOCABULARY)}

_MEANINGS: dict[str, str] = {
    "red": "crimson scarlet ruby cherry maroon vermilion",
    "green": "lime emerald olive mint",
    "blue": "navy azure sapphire cobalt indigo",
    "yellow": "gold golden orange amber lemon",
    "magenta": "purple violet pink fuchsia lilac",
    "cyan": "turquoise aqua teal",
    "black": "dark night",
    "white": "snowy bright",
    "gray": "grey silver",
    "ball": "balls circle circles sphere spheres disc discs disk disks dot dots orb orbs bubble",
    "square": "squares box boxes cube cubes block blocks rectangle rectangles",
    "triangle": "triangles pyramid pyramids wedge",
    "small": "little tiny mini smaller",
    "big": "large huge giant bigger",
    "slowly": "slow calm calmly gently lazily",
    "quickly": "quick fast rapid rapidly swift swiftly",
    "moving": (
        "move moves bouncing bounce bounces flying flies drifting drifts floating floats gliding"
    ),
    "and": "with plus beside",
    "on": "over against before upon",
    "background": "backdrop sky scene wall",
    "empty": "nothing blank bare nobody",
    "back": "returns return returning again reappears",
}
SYNONYMS: dict[str, str] = {
    other: word for word, others in _MEANINGS.items() for other in others.split()
}

SILENT = frozenset(
    ["a", "an", "the", "is", "are", "there", "of", "in", "it", "its", "comes", "come"]
)

_WORD = re.compile(r"[^\W\d_]+")


def read_prompt(prompt: str) -> tuple[list[int], list[str], list[str]]:
    """Ids of the understood words in their order; the words understood; the words ignored."""
    ids: list[int] = []
    understood: list[str] = []
    ignored: list[str] = []
    for word in _WORD.findall(prompt.lower()):
        if word in SILENT:
            continue
        meaning = IDS.get(SYNONYMS.get(word, word))
        if meaning is None:
            ignored.append(word)
        else:
            ids.append(meaning)
            understood.append(word)
    return ids, understood, ignored


def padded_ids(prompt: str, length: int) -> list[int]:
    """Ids of a prompt, cut or filled up with padding to `length`."""
    ids = read_prompt(prompt)[0][:length]
    return ids + [IDS[PADDING]] * (length - len(ids))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over all rows, padding included, and a feed-forward net."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_BLD)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = (fn.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x_BLD + self.out(mixed)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class WordTextEncoder(nn.Module):
    """Words to the rows that the transformer's cross-attention reads."""

    def __init__(self, shape: WordTextShape, text_dim: int, text_len: int) -> None:
        super().__init__()
        require(text_dim % shape.heads == 0, "text.heads", shape.heads, f"divide {text_dim}")
        self.text_len = text_len
        self.words = nn.Embedding(len(VOCABULARY), text_dim)
        self.positions = nn.Parameter(torch.randn(text_len, text_dim) * 0.1)
        self.layers = nn.ModuleList(
            EncoderLayer(text_dim, shape.heads) for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(text_dim)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x = self.words(ids_BL) + self.positions
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out

    def encode(self, prompt: str) -> Tensor:
        """Rows [1, text_len, text_dim] of one prompt; unknown words leave no trace."""
        ids = torch.tensor([padded_ids(prompt, self.text_len)], device=self.positions.device)
        return self(ids)  # type: ignore[no-any-return]

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The words that shape the video and the words that were ignored, in prompt order.

        Known words beyond the encoder's length count as ignored.
        """
        _, understood, ignored = read_prompt(prompt)
        kept, surplus = understood[: self.text_len], understood[self.text_len :]
        return kept, ignored + surplus
