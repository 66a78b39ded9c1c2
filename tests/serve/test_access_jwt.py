"""Tokens of an issuer elsewhere: which are taken, and how its keys change."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fakes import FakeClock

from echo_ray.config_access import JwtSection
from echo_ray.errors import ConfigError, EchoError, TokenExpired, TokenInvalid, UnavailableError
from echo_ray.serve import access_jwt
from echo_ray.serve.access_files import LOOK_S
from echo_ray.serve.access_jwt import JwtTokens, parse_jwks
from echo_ray.session.access import Role

RSA, OTHER = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())


def key_set(**keys: Any) -> str:
    rows = []
    for key_id, key in keys.items():
        kind = jwt.algorithms.RSAAlgorithm if key is not EC else jwt.algorithms.ECAlgorithm
        row = json.loads(kind.to_jwk(key.public_key()))
        rows.append({**row, "kid": key_id, "alg": "RS256" if key is not EC else "ES256"})
    return json.dumps({"keys": rows})


def token(key: Any = RSA, kid: str | None = "one", alg: str = "RS256", **changes: Any) -> str:
    now = time.time()
    claims = {
        "iss": "https://issuer.example", "aud": "echo", "sub": "alice", "exp": now + 60,
        "tenant": "acme", "roles": ["user"], **changes,
    }  # fmt: skip
    claims = {k: v for k, v in claims.items() if v is not None}
    return jwt.encode(claims, key, alg, headers={"kid": kid} if kid else {})


def section(jwks: str, **changes: Any) -> JwtSection:
    return JwtSection(jwks=jwks, issuer="https://issuer.example", audience="echo", **changes)


@pytest.fixture
def tokens(tmp_path: Path) -> JwtTokens:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(one=RSA, two=EC))
    return JwtTokens(section(str(file)), FakeClock())


def refused(tokens: JwtTokens, text: str, kind: type[EchoError] = TokenInvalid) -> None:
    with pytest.raises(kind) as caught:
        asyncio.run(tokens.principal(text))
    assert type(caught.value) is kind
    assert text.split(".")[1] not in caught.value.message


def test_a_good_token_says_who_it_is(tokens: JwtTokens) -> None:
    found = asyncio.run(tokens.principal(token()))
    assert (found.name, found.tenant, found.roles) == ("alice", "acme", {Role.USER})
    assert found.session is None
    assert 60 < found.expires_at - time.time() <= 71
    found = asyncio.run(tokens.principal(token(EC, "two", "ES256", roles="admin user what")))
    assert found.roles == {Role.USER, Role.ADMIN}


def unsigned() -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"none","kid":"one"}').rstrip(b"=").decode()
    return f"{head}.{token().split('.')[1]}."


BAD: dict[str, Any] = {
    "another issuer": lambda: token(iss="https://evil.example"),
    "another audience": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "no expiry": lambda: token(exp=None),
    "not yet": lambda: token(nbf=time.time() + 600),
    "made in the future": lambda: token(iat=time.time() + 600),
    "no tenant": lambda: token(tenant=None),
    "an empty tenant": lambda: token(tenant=""),
    "a tenant that is none": lambda: token(tenant="a/b"),
    "roles that are none": lambda: token(roles=None),
    "another key": lambda: token(OTHER),
    "an unknown key id": lambda: token(kid="three"),
    "no key id": lambda: token(kid=None),
    "the key of another algorithm": lambda: token(RSA, "two"),
    "a weaker algorithm": lambda: token(alg="RS384"),
    "a shared secret": lambda: token("s" * 32, alg="HS256"),
    "no signature": unsigned,
    "rubbish": lambda: "a.b.c",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_token_is_refused(what: str, tokens: JwtTokens) -> None:
    refused(tokens, BAD[what]())


def test_an_old_token_is_told_so(tokens: JwtTokens) -> None:
    refused(tokens, token(exp=time.time() - 60), TokenExpired)
    asyncio.run(tokens.principal(token(exp=time.time() - 5)))


def test_a_public_key_is_no_shared_secret(tokens: JwtTokens) -> None:
    from cryptography.hazmat.primitives import serialization as s

    pem = RSA.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    good = token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"one"}').rstrip(b"=")
    import hmac

    body = head + b"." + good[1].encode()
    sign = base64.urlsafe_b64encode(hmac.digest(pem, body, "sha256")).rstrip(b"=")
    refused(tokens, f"{body.decode()}.{sign.decode()}")


def test_a_key_set_that_is_none_is_refused() -> None:
    for text in ("", "[]", "{}", '{"keys": 1}', '{"keys": [1]}', '{"keys": []}'):
        with pytest.raises(ConfigError):
            parse_jwks(text, ("RS256",))
    with pytest.raises(ConfigError, match="for ES256"):
        parse_jwks(key_set(one=RSA), ("ES256",))


def test_a_file_of_keys_is_read_again(tmp_path: Path) -> None:
    file, clock = tmp_path / "jwks.json", FakeClock()
    with pytest.raises(ConfigError, match="cannot be read"):
        JwtTokens(section(str(file)), clock)
    file.write_text(key_set(one=RSA))
    tokens = JwtTokens(section(str(file)), clock)
    refused(tokens, token(OTHER, "next"))
    file.write_text(key_set(one=RSA, next=OTHER))
    clock.advance(LOOK_S)
    asyncio.run(tokens.principal(token(OTHER, "next")))


@pytest.fixture
def issuer() -> Iterator[ThreadingHTTPServer]:
    """An issuer's server; `text` is what it publishes, None: it fails."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server: Any = self.server
            server.asked += 1
            self.send_response(500 if server.text is None else 200)
            self.end_headers()
            self.wfile.write((server.text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.text, server.asked = key_set(one=RSA), 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetched_keys_are_kept_and_rotate(issuer: Any) -> None:
    clock = FakeClock()
    url = f"http://127.0.0.1:{issuer.server_port}/jwks"

    async def test() -> None:
        tokens = JwtTokens(section(url), clock)
        await asyncio.gather(*(tokens.principal(token()) for _ in range(20)))
        assert issuer.asked == 1
        for _ in range(5):
            with pytest.raises(TokenInvalid):
                await tokens.principal(token(OTHER, "next"))
        assert issuer.asked == 1, "an unknown key id asks at most every ten seconds"
        issuer.text = key_set(next=OTHER)
        clock.advance(access_jwt.UNKNOWN_S)
        await tokens.principal(token(OTHER, "next"))
        with pytest.raises(TokenInvalid):
            await tokens.principal(token())
        issuer.text = None
        clock.advance(400)
        await tokens.principal(token(OTHER, "next"))
        assert issuer.asked == 3, "an issuer that is down changes nothing"
        issuer.text = "x" * (access_jwt.MAX_JWKS_BYTES + 1)
        clock.advance(400)
        await tokens.principal(token(OTHER, "next"))

    asyncio.run(test())


def test_keys_that_never_came_are_worth_a_retry(issuer: Any) -> None:
    issuer.text = None
    tokens = JwtTokens(section(f"http://127.0.0.1:{issuer.server_port}/jwks"), FakeClock())
    refused(tokens, token(), UnavailableError)
