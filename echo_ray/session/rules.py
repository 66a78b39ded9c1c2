"""What a client may ask for: the rules of prompts, seeds, labels, event ids, and a new session.

Values come in as a client sent them, checked for nothing but their JSON type or not even that.
Randomness and time are arguments.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Collection, Mapping

from echo_ray.config import LimitsSection
from echo_ray.errors import InvalidRequestError, ModelUnknown, PromptError, SegmentBeyondEnd
from echo_ray.session.records import OnIdle, Pace, SessionRecord

MAX_SEED = 2**63 - 1
EVENT_ID_CHARS = 128
SESSION_ID_BYTES = 10
_LINE_CHARS = "\n\t"


def session_id(random_bytes: bytes) -> str:
    """A session id from ten random bytes: `ses_` and sixteen lower-case letters and digits."""
    if len(random_bytes) != SESSION_ID_BYTES:
        raise ValueError(f"{len(random_bytes)} random bytes, not {SESSION_ID_BYTES}")
    return "ses_" + base64.b32encode(random_bytes).decode().lower()


def check_prompt(value: object, limits: LimitsSection, *, param: str = "prompt") -> str:
    """A prompt that a model can be asked. Raises `PromptError`."""
    if not isinstance(value, str):
        raise PromptError(f"{param}: expected a string, got {type(value).__name__}", param=param)
    if not value.strip():
        raise PromptError(f"{param} is empty; say what to show", param=param)
    if len(value) > limits.prompt_chars:
        raise PromptError(
            f"{param} has {len(value)} characters; at most {limits.prompt_chars}: shorten it",
            param=param,
        )
    bad = next((c for c in value if _is_control(c)), None)
    if bad is not None:
        raise PromptError(
            f"{param} holds the control character U+{ord(bad):04X} at {value.index(bad)}; "
            "remove it (line breaks and tabs are allowed)",
            param=param,
        )
    return value


def check_seed(value: object) -> int:
    """A seed from 0 to 2**63 - 1. Raises `InvalidRequestError`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(f"seed: {_shown(value)} is not a whole number", param="seed")
    if not 0 <= value <= MAX_SEED:
        raise InvalidRequestError(
            f"seed: {_shown(value)} is out of range; 0 to {MAX_SEED}", param="seed"
        )
    return value


def check_labels(value: object, limits: LimitsSection) -> dict[str, str]:
    """Labels: a small map of short printable strings. Raises `InvalidRequestError`."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"labels: expected an object, got {type(value).__name__}", param="labels"
        )
    if len(value) > limits.label_count:
        raise InvalidRequestError(
            f"labels: {len(value)} given; at most {limits.label_count}", param="labels"
        )
    labels: dict[str, str] = {}
    for key, text in value.items():
        for part, what in ((key, "key"), (text, "value")):
            if not isinstance(part, str) or len(part) > limits.label_chars:
                raise InvalidRequestError(
                    f"labels: {what} {_shown(part)} is not a string of at most "
                    f"{limits.label_chars} characters",
                    param="labels",
                )
        if not key or not key.isprintable() or not (text == "" or text.isprintable()):
            raise InvalidRequestError(
                f"labels: {_shown(key)} is empty or holds control characters", param="labels"
            )
        labels[key] = text
    return labels


def check_event_id(value: object) -> str:
    """An event id chosen by a client: 1 to 128 printable characters."""
    ok = isinstance(value, str) and 0 < len(value) <= EVENT_ID_CHARS and value.isprintable()
    if not ok:
        raise InvalidRequestError(
            f"event_id: {_shown(value)} is not a string of 1 to {EVENT_ID_CHARS} printable "
            "characters",
            param="event_id",
        )
    return str(value)


def check_start(start: int | None, next_index: int) -> int:
    """The first index a viewer gets: the one asked for, or the live edge.

    Raises `SegmentBeyondEnd` when it lies past the next chunk to be generated.
    """
    if start is None:
        return next_index
    if start < 0:
        raise InvalidRequestError(f"from: {start} is negative; the first index is 0", param="from")
    if start > next_index:
        raise SegmentBeyondEnd(
            f"from: {start} lies beyond the end; the next chunk is {next_index}", param="from"
        )
    return start


def check_choice(value: object, choices: Collection[str], param: str) -> str:
    """One of a few words. Raises `InvalidRequestError`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequestError(
            f"{param}: {_shown(value)} is unknown; one of {', '.join(sorted(choices))}", param=param
        )
    return value


def new_session(
    *,
    new_id: str,
    prompt: object,
    seed: object,
    model: str | None,
    served_model: str,
    pace: object = Pace.REALTIME.value,
    on_idle: object = OnIdle.PAUSE.value,
    labels: object = None,
    limits: LimitsSection,
    now: float,
) -> SessionRecord:
    """The record of a new session, every field checked. Raises `InvalidRequestError` subclasses."""
    if model is not None and model != served_model:
        raise ModelUnknown(
            f"model {_shown(model)} is not served here; served: {served_model}", param="model"
        )
    return SessionRecord(
        id=new_id,
        model=served_model,
        prompt=check_prompt(prompt, limits),
        seed=check_seed(seed),
        pace=Pace(check_choice(pace, [p.value for p in Pace], "pace")),
        on_idle=OnIdle(check_choice(on_idle, [o.value for o in OnIdle], "on_idle")),
        labels=check_labels({} if labels is None else labels, limits),
        created_at=now,
    )


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") and char not in _LINE_CHARS


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
