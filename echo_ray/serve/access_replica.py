"""Who may talk to a replica: routers, which show the secret that both were started with.

A replica has no users, only routers; it checks nothing but this. Its probes and metrics are open,
and nothing else is while access is on.
"""

from __future__ import annotations

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from echo_ray.clock import Clock
from echo_ray.config_access import AccessSection
from echo_ray.errors import TokenInvalid
from echo_ray.serve.access_files import Secret

OPEN = ("/healthz", "/metrics")
_SCHEME = b"Bearer "


def replica_secret(section: AccessSection, clock: Clock) -> Secret:
    """The secret of both sides; an empty one while access is off. Raises `ConfigError`."""
    named = (section.replica_secret_env, section.replica_secret_file)
    return Secret("access.replica_secret", *(named if section.enabled else (None, None)), clock)


def replica_headers(secret: Secret) -> dict[str, str]:
    """What a router sends."""
    accepted = secret.accepted
    return {"Authorization": (_SCHEME + accepted[0]).decode()} if accepted else {}


class RoutersOnly:
    """The middleware of a replica's door."""

    def __init__(self, app: ASGIApp, secret: Secret) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] in ("http", "websocket") and scope["path"] not in OPEN
        if not closed or self._admits(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            # Before it is accepted: the handshake is answered with 403.
            await send({"type": "websocket.close", "code": TokenInvalid.ws_close})
            return
        error = TokenInvalid("only routers of this service may ask a replica")
        await JSONResponse({"error": error.to_dict()}, error.http_status)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        accepted = self._secret.accepted
        if not accepted:
            return True
        shown = [v for k, v in scope["headers"] if k == b"authorization"]
        given = shown[0] if len(shown) == 1 else b""
        return any(hmac.compare_digest(given, _SCHEME + secret) for secret in accepted)
