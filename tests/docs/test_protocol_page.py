"""`docs/protocol.md` names every message, error code and route that the code has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from echo_ray import wire
from echo_ray.errors import EchoError

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def tree(kind: type[EchoError]) -> Iterator[type[EchoError]]:
    yield kind
    for child in kind.__subclasses__():
        # Other modules may refine an error for themselves; its code stays the parent's.
        if child.__module__ == EchoError.__module__:
            yield from tree(child)


@pytest.mark.parametrize("kind", list(tree(EchoError)), ids=lambda k: k.code)
def test_error_codes_with_status_and_close_code(kind: type[EchoError]) -> None:
    assert f"| `{kind.code}` | {kind.http_status} | {kind.ws_close} |" in PAGE


@pytest.mark.parametrize("kind", wire.Message.__subclasses__(), ids=lambda k: k.type)
def test_message_types(kind: type[wire.Message]) -> None:
    assert f"`{kind.type}`" in PAGE


def test_codes_are_unique() -> None:
    codes = [k.code for k in tree(EchoError)]
    assert len(codes) == len(set(codes))
