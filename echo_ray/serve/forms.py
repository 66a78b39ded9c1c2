"""The body that creates a session: JSON, or a form that carries the same JSON and a clip.

Content-Type: multipart/form-data      session   the JSON object
                                       clip      a file: MP4, PNG or JPEG
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from echo_ray.errors import ClipInvalid, InvalidRequestError
from echo_ray.serve.schemas import NewSession

JSON = "application/json"
FORM = "multipart/form-data"
PARTS_AT_MOST = 8
"""More than any form of ours has; what is over is refused by name, and beyond this unread."""

_WISH = NewSession.model_json_schema()
NEW_SESSION_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        JSON: {"schema": _WISH},
        FORM: {
            "schema": {
                "type": "object",
                "properties": {
                    "session": _WISH,
                    "clip": {
                        "type": "string",
                        "format": "binary",
                        "description": "MP4, PNG or JPEG: the session continues it",
                    },
                },
                "required": ["session", "clip"],
                "additionalProperties": False,
            },
            "encoding": {
                "session": {"contentType": JSON},
                "clip": {"contentType": "video/mp4, image/png, image/jpeg"},
            },
        },
    },
}
"""The body in OpenAPI's words."""


def is_form(content_type: str) -> bool:
    """Whether a content type is that of a form with files."""
    return content_type.partition(";")[0].strip().lower() == FORM


async def new_session_of(request: Request) -> tuple[NewSession, bytes | None]:
    """The session asked for, and the clip if there is one. Raises `InvalidRequestError`."""
    kind = request.headers.get("content-type", "")
    if not is_form(kind):
        if kind.partition(";")[0].strip().lower() != JSON:
            raise InvalidRequestError(
                f"a body of type {kind[:80]!a} is not understood; send {JSON} or {FORM}",
                param="content-type",
            )
        return _wish(await request.body()), None
    _check_site(request)
    form = await _form(request)
    try:
        _check_fields(form)
        wish, clip = form["session"], form["clip"]
        if not isinstance(clip, UploadFile):
            raise InvalidRequestError(
                "clip is a plain field; send it as a file part, with a file name", param="clip"
            )
        text = await wish.read() if isinstance(wish, UploadFile) else wish
        session, data = _wish(text), await clip.read()
    finally:
        await form.close()
    if not data:
        raise ClipInvalid("clip is empty; send a video or a picture", param="clip")
    return session, data


def _check_site(request: Request) -> None:
    """Refuse what a page of another site makes a browser send: unlike JSON, forms need no leave."""
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise InvalidRequestError(
            "a form that a page of another site sent is refused; send it from a page of this one",
            param="sec-fetch-site",
        )


class _InMemory(MultiPartParser):
    """Parts stay where the body is: a full disk is none of their business."""

    spool_max_size = 2**31


async def _form(request: Request) -> FormData:
    # No part can be longer than the body, and that has its limit.
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=PARTS_AT_MOST,
        max_fields=PARTS_AT_MOST,
        max_part_size=2**62,
    )
    try:
        return await parser.parse()
    except (MultiPartException, ValueError) as error:
        raise InvalidRequestError(
            f"the body is not a form that can be read: {error}; send the parts session and clip",
            param="body",
        ) from error


def _check_fields(form: FormData) -> None:
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in ("session", "clip"):
            shown = ascii(name)[1:-1][:80]
            raise InvalidRequestError(
                f"part {shown} is unknown; a form has session and clip", param=shown
            )
        if names.count(name) > 1:
            raise InvalidRequestError(
                f"{name} is there {names.count(name)} times; send one", param=name
            )
    for name in ("session", "clip"):
        if name not in names:
            raise InvalidRequestError(
                f"the form has no part {name}; send session (a JSON object) and clip (a file)",
                param=name,
            )


def _wish(text: bytes | str) -> NewSession:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"the session is not JSON: {str(error)[:200]}; send a JSON object", param="body"
        ) from error
    try:
        return NewSession.model_validate(body)
    except ValidationError as error:
        found = [{**e, "loc": ("body", *e["loc"])} for e in error.errors()]
        raise RequestValidationError(found) from error
