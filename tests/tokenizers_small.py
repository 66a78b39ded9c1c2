"""A tokenizer of a few dozen pieces with the special tokens of umT5's, for tests without files."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = (
    *("▁", *"abcdefghijklmnopqrstuvwxyz", *".,!"),
    *("▁a", "▁the", "▁red", "▁green", "▁blue", "▁ball", "▁square", "▁big", "▁small"),
    *("▁on", "▁black", "▁white", "▁moving", "ing"),
)


def build_tokenizer(vocab: int = 64) -> Tokenizer:
    """Exactly `vocab` pieces: padding 0, end of sequence 1, unknown 2, then letters and words."""
    names = [*SPECIAL, *PIECES[: max(0, vocab - len(SPECIAL))]]
    names += [f"▁filler{i}" for i in range(vocab - len(names))]
    tokenizer = Tokenizer(
        models.Unigram([(name, -1.0 - 0.01 * i) for i, name in enumerate(names)], 2, False)
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def write_tokenizer(folder: Path, vocab: int = 64) -> None:
    """Write `tokenizer.json` into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(vocab).save(str(folder / "tokenizer.json"))
