"""Tokens of an issuer elsewhere: JSON Web Tokens, checked with the keys that the issuer publishes.

Algorithms are pinned, and a key may be used with its own alone; issuer, audience, expiry and begin
must all be right. Keys come from a file or an address and are kept: they are fetched again when
they are old or a token names an unknown one, at most once in `UNKNOWN_S`, whoever asks.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt

from echo_ray.clock import Clock
from echo_ray.config_access import TENANT, TENANT_RULE, JwtSection
from echo_ray.errors import ConfigError, TokenExpired, TokenInvalid, UnavailableError
from echo_ray.serve.access_files import WatchedFile
from echo_ray.serve.telemetry import log
from echo_ray.session.access import Principal, Role

UNKNOWN_S = 10.0
FETCH_TIMEOUT_S = 5.0
MAX_JWKS_BYTES = 2**20
MAX_NAME_CHARS = 128
_KEY = "access.jwt.jwks"
Keys = Mapping[str | None, jwt.PyJWK]


def parse_jwks(text: str | bytes, algorithms: tuple[str, ...]) -> Keys:
    """The usable signature keys of a key set, by id. Raises `ConfigError`."""
    try:
        rows = json.loads(text)["keys"]
        rows = [row for row in rows if row.get("use", "sig") == "sig"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{_KEY}: not a JSON Web Key Set: {error!r:.200}", param=_KEY) from error
    keys: dict[str | None, jwt.PyJWK] = {}
    for row in rows:
        try:
            key = jwt.PyJWK.from_dict(row)
        except jwt.PyJWTError:
            # Of a kind that nobody here can check: another service's.
            continue
        if key.algorithm_name in algorithms and key.key_id not in keys:
            keys[key.key_id] = key
    if not keys:
        raise ConfigError(
            f"{_KEY}: none of its {len(rows)} keys is for {', '.join(algorithms)} "
            "(access.jwt.algorithms)",
            param=_KEY,
        )
    return keys


class KeySet:
    """The issuer's keys."""

    def __init__(self, section: JwtSection, clock: Clock) -> None:
        """Raises `ConfigError` for a file that is not there; an address is asked later."""
        self._source = section.jwks or ""
        self._algorithms = section.algorithms
        self._refresh_s = section.refresh_s
        self._clock = clock
        self._turn = asyncio.Lock()
        self._asked_s: float | None = None
        self._fetched: Keys = {}
        self._file: WatchedFile[Keys] | None = None
        if "://" not in self._source:
            path = str(Path(self._source).expanduser())
            parse = lambda text: parse_jwks(text, self._algorithms)  # noqa: E731
            self._file = WatchedFile(_KEY, path, parse, clock)

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """The key of that id; without one, the only key. Raises `TokenInvalid`."""
        if self._file is not None:
            return _pick(self._file.value, key_id)
        old = self._due(self._refresh_s) and not self._turn.locked()
        if old or (key_id not in self._fetched and self._due(UNKNOWN_S)):
            async with self._turn:
                # Somebody else may have asked meanwhile.
                if self._due(UNKNOWN_S):
                    await self._fetch()
        if not self._fetched:
            raise UnavailableError(
                "the keys that tokens are checked with cannot be fetched; retry",
                retry_after_s=UNKNOWN_S,
            )
        return _pick(self._fetched, key_id)

    def _due(self, after_s: float) -> bool:
        return self._asked_s is None or self._clock.monotonic() - self._asked_s >= after_s

    async def _fetch(self) -> None:
        """Fetch the keys; those of before stay if that fails."""
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                data = await self._download()
            self._fetched = parse_jwks(data, self._algorithms)
        except (httpx.HTTPError, TimeoutError, ConfigError) as error:
            log(logging.ERROR, "jwks_kept", source=self._source, error=repr(error)[:300])
        finally:
            self._asked_s = self._clock.monotonic()

    async def _download(self) -> bytes:
        data = b""
        async with (
            httpx.AsyncClient(timeout=FETCH_TIMEOUT_S, follow_redirects=False) as client,
            client.stream("GET", self._source) as answer,
        ):
            answer.raise_for_status()
            async for piece in answer.aiter_bytes():
                data += piece
                if len(data) > MAX_JWKS_BYTES:
                    raise ConfigError(f"{_KEY}: more than {MAX_JWKS_BYTES} bytes", param=_KEY)
        return data


def _pick(keys: Keys, key_id: str | None) -> jwt.PyJWK:
    if key_id in keys:
        return keys[key_id]
    if key_id is None and len(keys) == 1:
        return next(iter(keys.values()))
    raise TokenInvalid("the token is signed with a key that its issuer does not publish")


class JwtTokens:
    """Reads the issuer's tokens."""

    def __init__(self, section: JwtSection, clock: Clock) -> None:
        self._section = section
        self._clock = clock
        self._keys = KeySet(section, clock)

    async def principal(self, token: str) -> Principal:
        """Whose token it is. Raises `TokenInvalid`, `TokenExpired`, `UnavailableError`."""
        section = self._section
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            key = await self._keys.find(key_id)
            claims = jwt.decode(
                token,
                key,
                algorithms=list(section.algorithms),
                issuer=section.issuer,
                audience=section.audience,
                leeway=section.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise TokenExpired("the token ran out; get a new one from its issuer") from None
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            why = type(error).__name__.removesuffix("Error")
            raise TokenInvalid(f"the token does not hold ({why}); get a new one") from None
        return self._principal(claims)

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        section = self._section
        tenant, roles = claims.get(section.tenant_claim), claims.get(section.roles_claim)
        if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
            raise TokenInvalid(f"the token's claim {section.tenant_claim!r}: {TENANT_RULE}")
        words = roles.split() if isinstance(roles, str) else roles
        if not isinstance(words, list):
            raise TokenInvalid(f"the token's claim {section.roles_claim!r} is not a list of roles")
        return Principal(
            name=str(claims.get("sub", "unnamed"))[:MAX_NAME_CHARS],
            tenant=tenant,
            roles=frozenset(role for role in Role if role.value in words),
            expires_at=float(claims["exp"]) + section.leeway_s,
        )
