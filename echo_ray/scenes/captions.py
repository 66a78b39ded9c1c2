"""Captions: what the prompt of each chunk says.

A caption leaves attributes out at random, but never one that changes in the clip: what the prompt
does not say must be predictable from the past.
"""

from __future__ import annotations

import numpy as np

from echo_ray.scenes.scripts import Script
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, RADII, SHAPES, SPEEDS

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
RADIUS_NAMES = tuple(RADII)
SPEED_NAMES = tuple(SPEEDS)
VERBS = ("moving", "bouncing", "flying")
MENTION = {"colour": 0.85, "size": 0.5, "speed": 0.4, "background": 0.92, "verb": 0.5}


def write_captions(rng: np.random.Generator, script: Script) -> tuple[str, ...]:
    """One caption a chunk, in one wording for the whole clip."""
    chunks, objects = script.colour_KO.shape
    says = {name: bool(rng.random() < share) for name, share in MENTION.items()}
    says["background"] |= bool((script.background_K != script.background_K[0]).any())
    says["colour"] |= objects > 1 or bool((script.colour_KO != script.colour_KO[0]).any())
    verb = rng.choice(VERBS)
    behind_first = bool(rng.random() < 0.25)
    captions = []
    seen, gone = False, False
    for k in range(chunks):
        behind = f"{BACKGROUND_NAMES[script.background_K[k]]} background"
        if not script.visible_KO[k].any():
            captions.append(f"empty {behind}")
            gone = seen
            continue
        seen = True
        subject = (
            "it comes back"
            if gone
            else " and ".join(_thing(script, k, o, says) for o in range(objects))
        )
        if says["verb"] and not gone:
            subject += f" {verb}"
        if says["speed"] and objects == 1 and not gone:
            subject += f" {SPEED_NAMES[script.speed_O[0]]}"
        if not says["background"]:
            captions.append(subject)
        elif behind_first:
            captions.append(f"on a {behind} {subject}")
        else:
            captions.append(f"{subject} on a {behind}")
    return tuple(captions)


def _thing(script: Script, k: int, o: int, says: dict[str, bool]) -> str:
    words = ["a"]
    if says["size"]:
        words.append(RADIUS_NAMES[script.size_O[o]])
    if says["colour"]:
        words.append(COLOUR_NAMES[script.colour_KO[k, o]])
    return " ".join([*words, SHAPES[script.shape_KO[k, o]]])
