"""Tokens, secrets and their files: what is taken, what is refused, and how they change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from access_rig import ROWS, SECRET, TOKENS, bearer, config, plant, viewer_token, write_tokens
from fakes import FakeClock
from router_rig import Rig, run

from echo_ray.config import EchoConfig, from_mapping
from echo_ray.config_access import AccessSection
from echo_ray.errors import ConfigError, Forbidden, TokenExpired, TokenInvalid
from echo_ray.serve import access_files
from echo_ray.serve.access_files import Secret, WatchedFile
from echo_ray.serve.access_tokens import VIEWER_PREFIX, ViewerTokens, parse_tokens
from echo_ray.session.access import EVERYBODY, Need, Role, check

ROW = "name: a, tenant: acme, roles: [user]"
BAD_TABLES = {
    "": "one key",
    "tokens: []": "one key",
    "tokens: {a: b}": "one key",
    "a: [": "not YAML at line",
    f"tokens: [{{{ROW}}}]": "either token or sha256",
    f"tokens: [{{{ROW}, token: short}}]": "20 ASCII characters",
    f"tokens: [{{{ROW}, token: 12345678901234567890}}]": "20 ASCII characters",
    f"tokens: [{{{ROW}, sha256: ABC}}]": "64 lower-case",
    f"tokens: [{{{ROW}, token: {'t' * 20}, extra: 1}}]": "extra",
    f"tokens: [{{{ROW}, token: {'t' * 20}}}, {{{ROW}, token: {'t' * 20}}}]": "twice",
    f"tokens: [{{name: a, roles: [user], token: {'t' * 20}}}]": "tenant",
    f"tokens: [{{name: a, tenant: 'a/b', roles: [user], token: {'t' * 20}}}]": "tenant",
    f"tokens: [{{name: a, tenant: acme, roles: [root], token: {'t' * 20}}}]": "roles",
    f"tokens: [{{name: a, tenant: acme, roles: [], token: {'t' * 20}}}]": "roles",
    f"tokens: [{{name: 'a b', tenant: acme, roles: [user], token: {'t' * 20}}}]": "name",
    f"tokens: [{{{ROW}, token: {'t' * 20}, expires: soon}}]": "expires",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_table_that_is_not_one_is_refused_without_telling_a_token(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tokens(text)
    assert BAD_TABLES[text] in caught.value.message
    assert "tttttt" not in caught.value.message


BAD_SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"enabled": True}, "access.enabled"),
    ({"enabled": True, "tokens_file": "t"}, "access.viewer_secret_env"),
    ({"enabled": True, "tokens_file": "t", "viewer_secret_env": "V"}, "access.replica_secret_env"),
    ({"viewer_secret_env": "V", "viewer_secret_file": "v"}, "access.viewer_secret_file"),
    ({"cors_origins": ["*"]}, "access.cors_origins"),
    ({"cors_origins": ["https://a.example/path"]}, "access.cors_origins"),
    ({"viewer_token_s": 1.0}, "access.viewer_token_s"),
    ({"quota": {"sessions": -1}}, "access.quota.sessions"),
    ({"quotas": [{"tenant": "a/b"}]}, "access.quotas.tenant"),
    ({"quotas": [{"tenant": "a"}, {"tenant": "a"}]}, "access.quotas"),
    ({"jwt": {"jwks": "http://a.example/k", "issuer": "i", "audience": "a"}}, "access.jwt.jwks"),
    ({"jwt": {"jwks": "keys.json", "audience": "a"}}, "access.jwt.issuer"),
    ({"jwt": {"jwks": "keys.json", "issuer": "i"}}, "access.jwt.audience"),
    ({"jwt": {"algorithms": ["HS256"]}}, "access.jwt.algorithms"),
    ({"jwt": {"algorithms": ["none"]}}, "access.jwt.algorithms"),
    ({"jwt": {"leeway_s": 3600.0}}, "access.jwt.leeway_s"),
    ({"jwt": {"refresh_s": 1.0}}, "access.jwt.refresh_s"),
    ({"jwt": {"tenant_claim": ""}}, "access.jwt.tenant_claim"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "param"), BAD_SECTIONS)
def test_a_section_that_cannot_be_is_refused(data: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(EchoConfig, {"access": data})
    assert caught.value.param == param


def test_access_is_off_unless_it_is_asked_for() -> None:
    assert not AccessSection().enabled
    for need in Need:
        check(EVERYBODY, need)


# Files


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file, clock = tmp_path / "secret", FakeClock()
    file.write_text(SECRET)
    secret = Secret("access.viewer_secret", None, str(file), clock)
    assert secret.accepted == (SECRET.encode(),)
    file.write_text(f"{'n' * 32}\n{SECRET}\n")
    assert secret.accepted == (SECRET.encode(),), "not looked at again so soon"
    clock.advance(access_files.LOOK_S)
    assert secret.accepted == (b"n" * 32, SECRET.encode())
    for broken in ("", "short"):
        file.write_text(broken)
        clock.advance(access_files.LOOK_S)
        assert len(secret.accepted) == 2
    file.unlink()
    clock.advance(access_files.LOOK_S)
    assert len(secret.accepted) == 2
    file.write_text("m" * 40)
    clock.advance(access_files.LOOK_S)
    assert secret.accepted == (b"m" * 40,)


def test_what_cannot_be_read_at_the_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, file = FakeClock(), tmp_path / "file"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        WatchedFile("key", str(file), str, clock)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        WatchedFile("key", str(file), str, clock)
    monkeypatch.setattr(access_files, "MAX_FILE_BYTES", 8)
    file.write_text("a" * 9)
    with pytest.raises(ConfigError, match="more than 8 bytes"):
        WatchedFile("key", str(file), str, clock)
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        Secret("access.viewer_secret", "NOT_THERE", None, clock)
    monkeypatch.setenv("NOT_THERE", "q" * 31)
    with pytest.raises(ConfigError) as caught:
        Secret("access.viewer_secret", "NOT_THERE", None, clock)
    assert "qqq" not in caught.value.message


# Viewer tokens


def test_a_viewer_token_holds_for_its_time_and_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", SECRET)
    clock = FakeClock()
    tokens = ViewerTokens(Secret("k", "OLD", None, clock), clock)
    token, until = tokens.mint("s1", "acme", "user", 60.0)
    found = tokens.principal(token)
    assert (found.session, found.tenant, found.roles) == ("s1", "acme", {Role.VIEWER})
    assert until == pytest.approx(clock.wall() + 60)
    clock.advance(60.0)
    with pytest.raises(TokenExpired, match="ran out 0 s ago"):
        tokens.principal(token)


def test_a_viewer_token_that_was_touched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEW", f"{'n' * 32} {SECRET}")
    monkeypatch.setenv("OLD", SECRET)
    clock = FakeClock()
    old = ViewerTokens(Secret("k", "OLD", None, clock), clock)
    new = ViewerTokens(Secret("k", "NEW", None, clock), clock)
    token, _ = old.mint("s1", "acme", "user", 60.0)
    assert new.principal(token).session == "s1", "the older secret still holds"
    with pytest.raises(TokenInvalid):
        old.principal(new.mint("s1", "acme", "user", 60.0)[0])
    for at in range(len(VIEWER_PREFIX), len(token)):
        other = "A" if token[at] != "A" else "B"
        with pytest.raises(TokenInvalid):
            old.principal(token[:at] + other + token[at + 1 :])
    for text in (VIEWER_PREFIX, f"{VIEWER_PREFIX}.", f"{token}=", f"{token}.x", f"{token} "):
        with pytest.raises(TokenInvalid):
            old.principal(text)
    with pytest.raises(Forbidden, match="no viewer tokens"):
        ViewerTokens(Secret("k", None, None, clock), clock).principal(token)


# Through the service


def test_tokens_of_the_file_come_and_go_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_files, "LOOK_S", 0.0)

    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)

        async def code() -> str:
            answer = await rig.call("GET", "/v1/sessions/s1", headers=bearer(TOKENS["user"]))
            return "ok" if answer.is_success else str(answer.json()["error"]["code"])

        file = tmp_path / "tokens"
        assert await code() == "ok"
        write_tokens(file, ROWS[1:])
        assert await code() == "token_invalid"
        file.write_text("tokens: [")
        assert await code() == "token_invalid"
        write_tokens(file, ROWS)
        assert await code() == "ok"

    run(test, config(tmp_path))


def test_the_owner_makes_a_viewer_token_and_it_may_stand_in_a_url(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)
        path, mine = "/v1/sessions/s1/viewer-tokens", bearer(TOKENS["user"])
        made = (await rig.call("POST", path, {"ttl_s": 20}, headers=mine)).json()
        assert made["session"] == "s1"
        assert 15 < made["expires_at"] - time.time() <= 20
        longest = (await rig.call("POST", path, headers=mine)).json()
        assert 290 < longest["expires_at"] - time.time() <= 300
        assert (await rig.call("POST", path, {"ttl_s": 80_000}, headers=mine)).status_code == 201
        for bad in ({"ttl_s": 0}, {"ttl_s": "1"}, {"ttl": 1}):
            assert (await rig.call("POST", path, bad, headers=mine)).status_code == 400
        assert (await rig.call("GET", f"/v1/sessions/s1?token={made['token']}")).status_code == 200
        in_url = await rig.call("GET", f"/v1/sessions/s1?token={TOKENS['user']}")
        assert in_url.json()["error"]["code"] == "token_invalid"
        assert "only viewer tokens" in in_url.json()["error"]["message"]
        both = await rig.call("GET", f"/v1/sessions/s1?token={made['token']}&token=x")
        assert both.status_code == 401
        writing = await rig.call("POST", f"/v1/sessions/s1/pause?token={made['token']}")
        assert writing.json()["error"]["code"] == "unauthenticated"

    run(test, config(tmp_path))


def test_without_access_there_are_no_viewer_tokens() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)
        answer = await rig.call("POST", "/v1/sessions/s1/viewer-tokens")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")

    run(test)


BAD_HEADERS: list[list[tuple[str, str]]] = [
    [("Authorization", "Basic dXNlcjpwdw==")],
    [("Authorization", "Bearer")],
    [("Authorization", TOKENS["user"])],
    [("Authorization", f"Bearer {TOKENS['user']}"), ("Authorization", "Bearer x")],
    [("Authorization", f"Bearer {'x' * 9000}")],
    [("Authorization", "Bearer a.b.c")],
]


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        for headers in BAD_HEADERS:
            answer = await rig.http.get(rig.url("/v1/models"), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_invalid")
        answer = await rig.http.get(
            rig.url("/v1/models"), headers={"Authorization": b"Bearer \xff\xfe"}
        )
        assert answer.status_code == 401
        spelled = {"authorization": f"bEaReR   {viewer_token(tmp_path)}"}
        assert (await rig.http.get(rig.url("/v1/models"), headers=spelled)).status_code == 200

    run(test, config(tmp_path))
