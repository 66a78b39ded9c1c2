"""Tokens that this service knows by itself: those of a file, and viewer tokens that it signs.

tokens:                      the file, as YAML or JSON
  - name: alice              for the audit log
    tenant: acme
    roles: [user]            user, viewer, admin
    sha256: 9f86d081...      of the token; or `token: ...` in plain text
    expires: 2027-01-31      optional

echo-view.BODY.SIGNATURE     a viewer token: JSON {session, tenant, name, until}, HMAC-SHA256
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from echo_ray.clock import Clock
from echo_ray.config_access import TENANT, TENANT_RULE
from echo_ray.errors import ConfigError, Forbidden, TokenExpired, TokenInvalid
from echo_ray.serve.access_files import Secret
from echo_ray.session.access import Principal, Role

VIEWER_PREFIX = "echo-view."
TOKEN_CHARS = 20
"""Shorter tokens are refused."""
_KEY = "access.tokens_file"
_FIELDS = {"name", "tenant", "roles", "sha256", "token", "expires"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\x21-\x7e]{1,64}")

Table = Mapping[str, Principal]
"""By the SHA-256 of the token."""


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def parse_tokens(text: str) -> Table:
    """The table in a file's text. Raises `ConfigError`, which never tells a token."""
    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # Its words would quote the file.
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark is not None else ""
        raise _wrong(f"not YAML{at}") from None
    rows = body.get("tokens") if isinstance(body, dict) and set(body) == {"tokens"} else None
    if not isinstance(rows, list) or not rows:
        raise _wrong("expected one key `tokens` with a list of tokens")
    table: dict[str, Principal] = {}
    for number, row in enumerate(rows, 1):
        digest, principal = _row(row, f"token {number}")
        if digest in table:
            raise _wrong(f"token {number} is there twice")
        table[digest] = principal
    return table


def known(table: Table, token: str, now: float) -> Principal:
    """Whose token this is. Raises `TokenInvalid`, `TokenExpired`."""
    principal = table.get(digest_of(token))
    if principal is None:
        raise TokenInvalid("the token is not known; send one that was issued for this service")
    return check_time(principal, now)


def check_time(principal: Principal, now: float) -> Principal:
    """The principal. Raises `TokenExpired`."""
    if now >= principal.expires_at:
        ago_s = now - principal.expires_at
        raise TokenExpired(f"the token ran out {ago_s:.0f} s ago; get a new one")
    return principal


def _row(row: object, at: str) -> tuple[str, Principal]:
    if not isinstance(row, dict) or not set(row) <= _FIELDS:
        unknown = sorted(map(str, set(row) - _FIELDS)) if isinstance(row, dict) else []
        raise _wrong(f"{at}: expected a mapping of {', '.join(sorted(_FIELDS))}; not {unknown}")
    name, tenant, roles = row.get("name"), row.get("tenant"), row.get("roles")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(f"{at}: name: give 1 to 64 printable characters without spaces")
    at = f"{at} ({name})"
    # The empty tenant is that of sessions made while access was off; it has to be written down.
    if not isinstance(tenant, str) or (tenant and not TENANT.fullmatch(tenant)):
        raise _wrong(f"{at}: tenant: {tenant!r:.80}: {TENANT_RULE}")
    if not isinstance(roles, list) or not roles or not all(r in set(Role) for r in roles):
        raise _wrong(f"{at}: roles: {roles!r:.80}: a list of {', '.join(Role)}")
    principal = Principal(
        name=name,
        tenant=tenant,
        roles=frozenset(Role(r) for r in roles),
        expires_at=_expiry(row.get("expires"), at),
    )
    return _digest(row, at), principal


def _digest(row: Mapping[str, Any], at: str) -> str:
    token, digest = row.get("token"), row.get("sha256")
    if (token is None) == (digest is None):
        raise _wrong(f"{at}: give either token or sha256")
    if digest is not None:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _wrong(f"{at}: sha256: expected 64 lower-case hexadecimal digits")
        return digest
    if not isinstance(token, str) or len(token) < TOKEN_CHARS or not token.isascii():
        raise _wrong(f"{at}: token: expected {TOKEN_CHARS} ASCII characters or more")
    return digest_of(token)


def _expiry(value: object, at: str) -> float:
    if value is None:
        return math.inf
    if isinstance(value, datetime.datetime):
        moment = value
    elif isinstance(value, datetime.date):
        moment = datetime.datetime(value.year, value.month, value.day)
    else:
        raise _wrong(f"{at}: expires: {value!r:.80} is no date; write 2027-01-31 or a time")
    utc = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return utc.timestamp()


def _wrong(why: str) -> ConfigError:
    return ConfigError(f"{_KEY}: {why}", param=_KEY)


class ViewerTokens:
    """Short-lived tokens to look at one session; the only ones that may stand in a URL."""

    def __init__(self, secret: Secret, clock: Clock) -> None:
        self._secret = secret
        self._clock = clock

    def mint(self, session_id: str, tenant: str, name: str, ttl_s: float) -> tuple[str, float]:
        """A token and the wall time at which it runs out."""
        until = round(self._clock.wall() + ttl_s, 3)
        body = json.dumps(
            {"session": session_id, "tenant": tenant, "name": name, "until": until},
            separators=(",", ":"),
        )
        part = _b64(body.encode())
        return f"{VIEWER_PREFIX}{part}.{_b64(_sign(self._secret.accepted[0], part))}", until

    def principal(self, token: str) -> Principal:
        """Raises `TokenInvalid`, `TokenExpired`; `Forbidden` if there are no such tokens here."""
        if not self._secret.accepted:
            raise Forbidden("this service has no viewer tokens (access.viewer_secret_env)")
        part, _, signature = token.removeprefix(VIEWER_PREFIX).partition(".")
        try:
            given = _unb64(signature)
            signed = [hmac.compare_digest(_sign(s, part), given) for s in self._secret.accepted]
            if not any(signed):
                raise _forged()
            body = json.loads(_unb64(part))
            principal = Principal(
                name=body["name"],
                tenant=body["tenant"],
                roles=frozenset({Role.VIEWER}),
                session=body["session"],
                expires_at=float(body["until"]),
            )
        except (ValueError, TypeError, KeyError, binascii.Error):
            raise _forged() from None
        return check_time(principal, self._clock.wall())


def _forged() -> TokenInvalid:
    return TokenInvalid("the viewer token was not made by this service; ask for a new one")


def _sign(secret: bytes, part: str) -> bytes:
    return hmac.digest(secret, f"{VIEWER_PREFIX}{part}".encode(), "sha256")


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), b"-_", validate=True)
    if _b64(data) != text:
        # One token, one spelling.
        raise ValueError("surplus bits")
    return data
