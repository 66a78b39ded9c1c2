"""A tokenizer with umT5's special tokens and any number of pieces, for synthetic weights."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from echo_ray.model.tokens import END, FILE_NAME

SPECIAL = ("<pad>", "</s>", "<unk>")
"""Padding 0, end of sequence 1, and what no piece covers."""
_LETTERS = "▁" + string.ascii_letters + string.digits + string.punctuation


def synthetic_tokenizer(vocab: int) -> Tokenizer:
    """Spells prompts letter by letter; pieces beyond the letters stand for nothing."""
    pieces = [*SPECIAL, *_LETTERS][:vocab]
    pieces += [f"<extra_{number}>" for number in range(len(pieces), vocab)]
    scored = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, SPECIAL.index("<unk>"), False))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END]}",
        pair=f"$A {SPECIAL[END]} $B {SPECIAL[END]}",
        special_tokens=[(SPECIAL[END], END)],
    )
    return tokenizer


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write `tokenizer.json` into a new folder."""
    folder.mkdir(parents=True)
    synthetic_tokenizer(vocab).save(str(folder / FILE_NAME))
