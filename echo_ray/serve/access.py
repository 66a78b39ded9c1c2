"""Access: who asks, whether they may, whether the session exists for them, and the audit log.

Stands in front of every route, before a body is read. What `access_rules.py` does not list is not
served; what asks for a session of another tenant hears what a session that is not there answers.
With access off everybody may do everything, and only request ids are left of it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from echo_ray import wire
from echo_ray.clock import Clock
from echo_ray.config_access import AccessSection
from echo_ray.errors import EchoError, Forbidden, NotFoundError, TokenInvalid, Unauthenticated
from echo_ray.serve.access_files import Secret, WatchedFile
from echo_ray.serve.access_jwt import JwtTokens
from echo_ray.serve.access_replica import replica_secret
from echo_ray.serve.access_rules import SOCKET, Rule, find
from echo_ray.serve.access_tokens import VIEWER_PREFIX, ViewerTokens, known, parse_tokens
from echo_ray.serve.logs import REQUEST_ID, about, log
from echo_ray.session import control_log
from echo_ray.session.access import EVERYBODY, NOBODY, Need, Principal, check, sees

TOKEN_CHARS = 8192
RECHECK_S = 5.0
"""An open stream's token is checked again this often: it may have run out or been withdrawn."""
TENANTS_KEPT = 4096
Answer = Callable[[EchoError], Response]
TenantOf = Callable[[str], Awaitable[str]]


@dataclass(slots=True)
class Visit:
    """One request or socket: who it is, and what the audit log is to say of it."""

    access: Access
    token: str | None
    rule: Rule | None
    session: str | None
    request: str
    principal: Principal = EVERYBODY
    code: str = ""
    """Of the error that it was answered with."""

    def check(self, need: Need) -> None:
        """Refuse what this one may not do. Raises `Forbidden`."""
        check(self.principal, need)

    async def until_over(self) -> EchoError:
        """Returns when the token does not hold any more, with the reason."""
        while True:
            left_s = self.principal.expires_at - self.access.clock.wall()
            await asyncio.sleep(max(0.0, min(left_s, RECHECK_S)))
            try:
                await self.access.check_again(self)
            except (Unauthenticated, Forbidden) as error:
                return error
            except EchoError:
                # Whoever could say does not answer; that is no reason to end a stream.
                continue

    def audit(self, action: str, outcome: str) -> None:
        """Write a line of the audit log; never a token."""
        if self.access.enabled:
            log(
                logging.INFO if outcome == "ok" else logging.WARNING,
                "audit",
                who=self.principal.name,
                tenant=self.principal.tenant,
                action=action,
                session=self.session,
                outcome=outcome,
                request_id=self.request,
            )


def check_access(section: AccessSection, clock: Clock) -> None:
    """Raise `ConfigError` for a secret or a file that is missing or not understood."""
    Access(section, clock)
    replica_secret(section, clock)


def visit_of(scope: Scope) -> Visit:
    """What `Guard` found out about a request."""
    visit: Visit = scope["echo.visit"]
    return visit


class Access:
    """Who may come in; one per router. Opening raises `ConfigError` for what is missing."""

    def __init__(self, section: AccessSection, clock: Clock) -> None:
        self.clock = clock
        self.enabled = section.enabled
        self._file = None
        self._jwt = None
        if section.enabled and section.tokens_file is not None:
            self._file = WatchedFile("access.tokens_file", section.tokens_file, parse_tokens, clock)
        if section.enabled and section.jwt.jwks is not None:
            self._jwt = JwtTokens(section.jwt, clock)
        secret = (section.viewer_secret_env, section.viewer_secret_file)
        named = secret if section.enabled else (None, None)
        self.viewers = ViewerTokens(Secret("access.viewer_secret", *named, clock), clock)

    async def principal(self, token: str, *, in_url: bool) -> Principal:
        """Whose token it is. Raises `TokenInvalid`, `TokenExpired`, `UnavailableError`."""
        if len(token) > TOKEN_CHARS or not token.isascii():
            raise TokenInvalid(f"the token has more than {TOKEN_CHARS} ASCII characters")
        if token.startswith(VIEWER_PREFIX):
            return self.viewers.principal(token)
        if in_url:
            raise TokenInvalid("only viewer tokens may stand in a URL; send this in the header")
        if self._jwt is not None and token.count(".") == 2:
            return await self._jwt.principal(token)
        if self._file is None:
            raise TokenInvalid("the token is not known; send one that was issued for this service")
        return known(self._file.value, token, self.clock.wall())

    async def admit(self, visit: Visit, *, in_url: bool) -> None:
        """Find out who it is, and whether they may. Raises `Unauthenticated`, `Forbidden`."""
        if not self.enabled or (visit.rule and visit.rule.need is Need.NOTHING):
            return
        if visit.token is None:
            check(None, Need.TOKEN)
        else:
            visit.principal = await self.principal(visit.token, in_url=in_url)
        if visit.rule is None:
            raise NotFoundError("nothing is there")
        check(visit.principal, visit.rule.need)
        bound = visit.principal.session is not None
        if bound and visit.session is None and visit.rule.need > Need.TOKEN:
            raise Forbidden("a viewer token is for one session only; name it in the path")

    async def check_again(self, visit: Visit) -> None:
        """Raises if the token of an open stream does not hold any more."""
        if self.enabled and visit.token is not None and visit.rule is not None:
            principal = await self.principal(visit.token, in_url=False)
            if principal.tenant != visit.principal.tenant:
                raise TokenInvalid("the token is another tenant's now; connect again")
            check(principal, visit.rule.need)
            visit.principal = principal


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, access: Access, tenant_of: TenantOf, answer: Answer) -> None:
        self._app = app
        self._access = access
        self._tenant_of = tenant_of
        self._answer = answer
        self._tenants: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["type"] == "http" else SOCKET
        rule, session = find(method, scope["path"]) or (None, None)
        visit = Visit(self._access, None, rule, session, _request_id(scope))
        if self._access.enabled:
            visit.principal = NOBODY
        scope["echo.visit"] = visit
        with about(request_id=visit.request):
            await self._let_in(visit, scope, receive, send)

    async def _let_in(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        rule = visit.rule
        try:
            visit.token, in_url = _token(scope, rule)
            await self._access.admit(visit, in_url=in_url)
            await self._check_visible(visit)
        except EchoError as error:
            visit.code = error.code
            visit.audit(rule.action or "read" if rule else "unknown", error.code)
            await self._refuse(error, visit, scope, receive, send)
        else:
            await self._serve(visit, scope, receive, send)

    async def _check_visible(self, visit: Visit) -> None:
        """A session's tenant never changes, so it is looked up once."""
        rule, session = visit.rule, visit.session
        hidden = rule is not None and Need.TOKEN < rule.need < Need.ADMIN
        if not self._access.enabled or session is None or not hidden:
            return
        tenant = self._tenants.get(session)
        if tenant is None:
            tenant = await self._tenant_of(session)
            if len(self._tenants) >= TENANTS_KEPT:
                self._tenants.pop(next(iter(self._tenants)))
            self._tenants[session] = tenant
        if not sees(visit.principal, session, tenant):
            raise control_log.not_found(session)

    async def _serve(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", visit.request.encode())]
                message = {**message, "headers": headers}
                self._note(visit, int(message["status"]))
            await send(message)

        if scope["type"] == "websocket" and visit.rule:
            visit.audit(visit.rule.action, "ok")
        await self._app(scope, receive, told)

    def _note(self, visit: Visit, status: int) -> None:
        action = visit.rule.action if visit.rule else ""
        if action:
            visit.audit(action, "ok" if status < 400 else visit.code or f"http_{status}")

    async def _refuse(
        self, error: EchoError, visit: Visit, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] == "websocket":
            # A browser is not told why a handshake failed, so the reason comes as a message.
            socket = WebSocket(scope, receive, send)
            try:
                await socket.accept()
                await socket.send_text(wire.encode(wire.error_message(error)))
                await socket.close(error.ws_close, error.code)
            except WebSocketDisconnect:
                return
            return
        answer = self._answer(error)
        answer.headers["X-Request-Id"] = visit.request
        if error.http_status == Unauthenticated.http_status:
            answer.headers["WWW-Authenticate"] = "Bearer"
        # The body was not read, and is not the next request.
        answer.headers["Connection"] = "close"
        await answer(scope, receive, send)


def _token(scope: Scope, rule: Rule | None) -> tuple[str | None, bool]:
    """The token of a request, and whether it stood in the URL. Raises `TokenInvalid`."""
    given = [v.decode("latin-1") for k, v in scope["headers"] if k == b"authorization"]
    if len(given) > 1:
        raise TokenInvalid("there is more than one header Authorization; send one")
    if given:
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise TokenInvalid("the header Authorization is not of the form: Bearer TOKEN")
        return token.strip(), False
    if rule is None or not rule.in_url:
        return None, False
    found = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
    if len(found) > 1:
        raise TokenInvalid("the URL has more than one token; send one")
    return (found[0], True) if found else (None, False)


def _request_id(scope: Scope) -> str:
    """The caller's own, if it can stand in a log; else a new one."""
    for name, value in scope["headers"]:
        text = value.decode("latin-1") if name == b"x-request-id" else ""
        if REQUEST_ID.fullmatch(text):
            return text
    return secrets.token_hex(8)
