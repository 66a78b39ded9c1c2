"""Captions: what the prompt of each chunk says, and other ways to say it.

The grammar, in the words that reach the encoder or are silent:

    caption   = scene | nothing
    scene     = one of SCENES, or of BARE where the background is not named
    who       = thing | thing ("and" | ",") thing | "it comes back" | thing "comes back"
    thing     = "a" [size] [colour] shape | "a" [colour] [size] shape | "a" shape {"," attribute}
    how       = "" | verb | speed | verb speed | speed verb | "leaves" | "enters"
    verb      = "moving"
    where     = ["empty"] background "background"
    shade     = ["empty"] background
    nothing   = one of NOTHING
    colour, background, shape, size, speed = the names in the tables of `world`

A clip has one wording from its first chunk to its last. Attributes are left out at random, but
never one that changes in the clip: what the prompt does not say must be predictable from the past.
An object that has been away is "it", or is named again. An object and "empty" in one caption mean
that the frame's border cuts the object off: it goes through it in this chunk, out if it was inside,
in if it was outside ("leaves" and "enters" are for the reader only).

Only one word is used for each thing. The model's reader turns synonyms into these words before its
encoder sees them, so that training on them would add nothing; `paraphrases` uses them to test the
reader. It drops unknown words likewise: FILLERS are dropped into some captions to test just that.

Shapes: K chunks, O objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from echo_ray.scenes.scripts import Script
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, RADII, SHAPES, SPEEDS

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
SIZE_NAMES = tuple(RADII)
SPEED_NAMES = tuple(SPEEDS)

MENTION = {"colour": 0.85, "size": 0.5, "speed": 0.4, "background": 0.92, "verb": 0.5}
"""Share of clips whose captions name it."""
MENTION_HIDDEN = {"colour": 0.2, "size": 0.3}
"""The same of clips whose object hides: what is to be remembered is what was seen, not said."""

SCENE_FIRST = "on a {where} there is {who} {how}"
SCENES: dict[str, float] = {
    "{who} {how} on a {where}": 0.24,
    "there is {who} {how} on a {where}": 0.08,
    "{who} on a {where}, {how}": 0.08,
    "on a {where} {who} {how}": 0.10,
    SCENE_FIRST: 0.08,
    "on a {where}, {how}, {who}": 0.05,
    "{how}, {who} on a {where}": 0.05,
    "{how} on a {where}, {who}": 0.05,
    "a {where} with {who} {how}": 0.05,
    "a {where}, {who} {how}": 0.06,
    "{who} {how}, a {where}": 0.06,
    "the background is {shade}, {who} {how}": 0.05,
    "{who} {how}, the background is {shade}": 0.05,
}
BARE = {"{who} {how}": 0.6, "there is {who} {how}": 0.2, "{how}, {who}": 0.2}
NOTHING = {
    "an empty {where}": 0.5,
    "empty {where}": 0.2,
    "there is an empty {where}": 0.1,
    "a {where}, empty": 0.1,
    "the background is {shade} and empty": 0.1,
}
ORDERS = {"size colour shape": 0.75, "colour size shape": 0.15, "shape size colour": 0.1}
"""Of the words of a thing; the last one only where there is one object, for it has no end."""
RETURNS = {"it comes back": 0.7, "{thing} comes back": 0.15, "{thing}": 0.15}
"""What is said of an object that has been away."""
FILLED = 0.15
"""Share of clips whose captions have unknown words in them."""
FILLERS = (
    "please", "show", "some", "very", "cool", "lovely", "shiny", "funny", "today", "happily",
    "video", "nice", "maybe", "picture", "quietly", "wonderful",
)  # fmt: skip

SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("azure", "navy"),
    "yellow": ("golden", "lemon"),
    "magenta": ("purple", "violet"),
    "cyan": ("turquoise", "teal"),
    "black": ("dark",),
    "white": ("snowy",),
    "gray": ("grey", "silver"),
    "ball": ("circle", "sphere", "disc"),
    "square": ("box", "cube", "block"),
    "triangle": ("pyramid", "wedge"),
    "small": ("little", "tiny"),
    "big": ("large", "huge"),
    "slowly": ("gently", "calmly"),
    "quickly": ("rapidly", "swiftly"),
    "moving": ("bouncing", "flying", "drifting"),
    "and": ("with", "beside"),
    "background": ("backdrop", "wall"),
    "on": ("over", "before"),
    "empty": ("blank", "bare"),
    "back": ("again",),
}
"""Other words for each word of the captions; a test holds them against the model's reader."""
WORDINGS = ("template", "reordered", "synonym", "filler")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How one clip is told from its first chunk to its last."""

    scene: str
    nothing: str
    order: str
    returns: str
    comma: bool
    """Between two objects, instead of "and"."""
    swapped: bool
    """The second object is named first."""
    colour: bool
    size: bool
    how: str
    fillers: int
    """Unknown words in each caption."""


PLAIN = Wording(
    scene=next(iter(SCENES)),
    nothing=next(iter(NOTHING)),
    order=next(iter(ORDERS)),
    returns="{thing}",
    comma=False,
    swapped=False,
    colour=True,
    size=True,
    how="moving",
    fillers=0,
)
"""Everything is named, in the most usual way."""


def write_captions(rng: np.random.Generator, script: Script) -> tuple[str, ...]:
    """One caption a chunk, in one wording for the whole clip."""
    wording = _draw_wording(rng, script)
    captions, gone, seen = [], False, False
    for k, hidden in enumerate(script.hidden_K):
        gone = gone or bool(hidden and seen)
        seen = seen or not hidden
        caption = say(script, k, wording, gone=gone)
        captions.append(_filled(rng, caption, wording.fillers))
    return tuple(captions)


def paraphrases(rng: np.random.Generator, script: Script, chunk: int) -> dict[str, str]:
    """A chunk's caption in each of WORDINGS; the first one names everything in the usual way."""
    plain = _plain(script)
    template = say(script, chunk, plain)
    other = replace(plain, scene=SCENE_FIRST, nothing="a {where}, empty", swapped=True)
    words = [str(rng.choice(SYNONYMS.get(word, (word,)))) for word in template.split()]
    return {
        "template": template,
        "reordered": say(script, chunk, other),
        "synonym": " ".join(words),
        "filler": _filled(rng, template, 6),
    }


def _plain(script: Script) -> Wording:
    how = _pace(script, "moving {speed}") if script.colour_KO.shape[1] == 1 else "moving"
    return replace(PLAIN, how=how)


def _pace(script: Script, form: str) -> str:
    return form.format(speed=SPEED_NAMES[script.speed_O[0]])


def _draw_wording(rng: np.random.Generator, script: Script) -> Wording:
    objects = script.colour_KO.shape[1]
    shares = MENTION | (MENTION_HIDDEN if script.kind == "hide" else {})
    says = {name: bool(rng.random() < share) for name, share in shares.items()}
    changing = bool((script.background_K != script.background_K[0]).any())
    says["background"] |= changing or bool(script.border_KO.any())
    says["colour"] |= objects > 1 or bool((script.colour_KO != script.colour_KO[0]).any())
    form = "moving" if says["verb"] else ""
    # Two objects have two speeds, and the sentence has one.
    if says["speed"] and objects == 1:
        form = str(rng.choice(("moving {speed}", "{speed} moving")) if form else "{speed}")
    order = _pick(rng, ORDERS)
    return Wording(
        scene=_pick(rng, SCENES if says["background"] else BARE),
        nothing=_pick(rng, NOTHING),
        order=order if objects == 1 or not order.startswith("shape") else PLAIN.order,
        returns=_pick(rng, RETURNS),
        comma=bool(rng.random() < 0.15),
        swapped=bool(rng.random() < 0.5),
        colour=says["colour"],
        size=says["size"],
        how=_pace(script, form),
        fillers=int(rng.integers(1, 4)) if rng.random() < FILLED else 0,
    )


def _pick(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def say(script: Script, k: int, wording: Wording, *, gone: bool = False) -> str:
    """The caption of chunk k; `gone`: what is to be seen has been away."""
    background = BACKGROUND_NAMES[script.background_K[k]]
    shown = np.flatnonzero(script.visible_KO[k])
    if not shown.size:
        return wording.nothing.format(where=f"{background} background", shade=background)
    how = "" if gone else wording.how
    if script.border_KO[k].any():
        background = f"empty {background}"
        how = "" if gone else _direction(script, k)
    things = [_thing(script, k, int(o), wording) for o in shown]
    if wording.swapped:
        things.reverse()
    who = (", " if wording.comma else " and ").join(things)
    if gone:
        who = wording.returns.format(thing=who)
    caption = wording.scene.format(
        who=who, how=how, where=f"{background} background", shade=background
    )
    return _tidied(caption)


def _thing(script: Script, k: int, o: int, wording: Wording) -> str:
    words = {
        "size": SIZE_NAMES[script.size_O[o]] if wording.size else "",
        "colour": COLOUR_NAMES[script.colour_KO[k, o]] if wording.colour else "",
        "shape": SHAPES[script.shape_KO[k, o]],
    }
    named = [words[part] for part in wording.order.split() if words[part]]
    between = ", " if wording.order.startswith("shape") else " "
    return f"a {between.join(named)}"


def _direction(script: Script, k: int) -> str:
    """Whether a cut-off object leaves or enters: by where it was before, or will be after."""
    whole = script.visible_KO[:, 0] & ~script.border_KO[:, 0]
    out = ~script.visible_KO[:, 0]
    before = np.flatnonzero((whole | out)[:k])
    if before.size:
        return "leaves" if whole[before[-1]] else "enters"
    after = np.flatnonzero((whole | out)[k:])
    return "enters" if after.size and whole[k + after[0]] else "leaves"


def _tidied(caption: str) -> str:
    """Without the traces of parts that were left out."""
    caption = re.sub(r"there is (it|a [^,]*) comes", r"\1 comes", caption)
    caption = re.sub(r"\ba empty", "an empty", caption)
    caption = re.sub(r"\s+,", ",", caption)
    return " ".join(re.sub(r",(\s*,)+", ",", caption).split()).strip(" ,")


def _filled(rng: np.random.Generator, caption: str, fillers: int) -> str:
    words = caption.split()
    for filler in rng.choice(FILLERS, fillers):
        words.insert(int(rng.integers(len(words) + 1)), str(filler))
    return " ".join(words)
