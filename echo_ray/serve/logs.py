"""The log lines of a process: one JSON object each, with what happened and whom it is about."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TextIO

LOGGER = "echo_ray"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""What an id may look like that somebody else gave a request."""
REQUEST_ID_HEADER = "X-Request-Id"
_about: ContextVar[Mapping[str, object]] = ContextVar("about", default=MappingProxyType({}))


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Every line that is written inside has these fields too: session, epoch, chunk, request_id."""
    known = {k: v for k, v in fields.items() if v is not None}
    token = _about.set({**_about.get(), **known})
    try:
        yield
    finally:
        _about.reset(token)


def request_id() -> str | None:
    """The id of the request that is being answered, if there is one."""
    found = _about.get().get("request_id")
    return found if isinstance(found, str) else None


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **(fields if isinstance(fields, dict) else {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class StoreOutages(logging.Filter):
    """Lets one line a second of each `store_failed` pass: an outage fails every try of everybody.

    The next line that passes says in `unsaid` how many were left out before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[object, object], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage() != "store_failed":
            return True
        fields: dict[str, object] = record.fields  # type: ignore[attr-defined]
        kind = (fields["op"], fields["error"])
        said_at, unsaid = self._said.get(kind, (-math.inf, 0))
        if abs(record.created - said_at) < 1.0:
            self._said[kind] = said_at, unsaid + 1
            return False
        if unsaid:
            record.fields = {**fields, "unsaid": unsaid}
        # Old kinds would pile up: an error's text may name a session.
        kept = {k: v for k, v in self._said.items() if abs(record.created - v[0]) < 60.0}
        self._said = {**kept, kind: (record.created, 0)}
        return True


def log(level: int, event: str, *, failure: BaseException | None = None, **fields: object) -> None:
    """Write one log line; `failure` adds its traceback."""
    told = {**_about.get(), **fields}
    logging.getLogger(LOGGER).log(level, event, extra={"fields": told}, exc_info=failure)


def log_as_json(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send this process's log lines to `stream` (standard error) as JSON; repeating it is safe."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(StoreOutages())
    logger = logging.getLogger(LOGGER)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
