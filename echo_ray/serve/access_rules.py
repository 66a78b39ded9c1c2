"""Every route, and what it asks of whoever calls it. A route that is not here is not served."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

from starlette.routing import compile_path

from echo_ray.session.access import Need

SOCKET = "WEBSOCKET"
"""Instead of a method."""


@dataclass(frozen=True)
class Rule:
    """One route. Those that change something, and streams, leave a line in the audit log."""

    method: str
    path: str
    need: Need
    action: str = ""
    """Its word in the audit log; empty: only refusals are written there."""
    in_url: bool = field(default=False, kw_only=True)
    """Whether a viewer token may stand in the URL."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return compile_path(self.path)[0]


_ONE = "/v1/sessions/{session_id}"
RULES: tuple[Rule, ...] = (
    Rule("GET", "/", Need.NOTHING),
    Rule("GET", "/player/{path:path}", Need.NOTHING),
    Rule("GET", "/healthz", Need.NOTHING),
    Rule("GET", "/readyz", Need.NOTHING),
    Rule("GET", "/metrics", Need.NOTHING),
    # It tells addresses of the inside.
    Rule("GET", "/metrics/targets", Need.ADMIN),
    Rule("GET", "/openapi.json", Need.NOTHING),
    Rule("GET", "/v1/models", Need.TOKEN),
    Rule("GET", "/v1/sessions", Need.WATCH),
    Rule("GET", _ONE, Need.WATCH, in_url=True),
    Rule("GET", f"{_ONE}/segments/{{n}}", Need.WATCH, in_url=True),
    Rule("GET", f"{_ONE}/stream.mjpeg", Need.WATCH, "stream.mjpeg", in_url=True),
    Rule(SOCKET, f"{_ONE}/stream", Need.WATCH, "stream", in_url=True),
    Rule("POST", "/v1/sessions", Need.USE, "session.create"),
    Rule("POST", "/v1/sessions/import", Need.USE, "session.import"),
    Rule("DELETE", _ONE, Need.USE, "session.delete"),
    Rule("POST", f"{_ONE}/pause", Need.USE, "session.pause"),
    Rule("POST", f"{_ONE}/resume", Need.USE, "session.resume"),
    Rule("POST", f"{_ONE}/events", Need.USE, "session.event"),
    Rule("POST", f"{_ONE}/fork", Need.USE, "session.fork"),
    Rule("POST", f"{_ONE}/rewind", Need.USE, "session.rewind"),
    Rule("GET", f"{_ONE}/export", Need.USE, "session.export"),
    Rule("GET", f"{_ONE}/snapshots", Need.USE),
    Rule("POST", f"{_ONE}/snapshots", Need.USE, "session.snapshot"),
    Rule("POST", f"{_ONE}/viewer-tokens", Need.USE, "session.viewer_token"),
    Rule("GET", "/v1/admin/replicas", Need.ADMIN),
    Rule("POST", "/v1/admin/replicas/{replica_id}/drain", Need.ADMIN, "admin.drain"),
    Rule("POST", "/v1/admin/sessions/{session_id}/migrate", Need.ADMIN, "admin.migrate"),
)


def find(method: str, path: str) -> tuple[Rule, str | None] | None:
    """The rule of a request and the session that it names; None if there is none."""
    wanted = "GET" if method == "HEAD" else method
    for rule in RULES:
        match = rule.pattern.match(path) if rule.method == wanted else None
        if match is not None:
            return rule, match.groupdict().get("session_id")
    return None
