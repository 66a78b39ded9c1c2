"""Access in the real service: tokens from the client to the router, the secret on to replicas."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from access_rig import TOKENS, section
from service import running_service, take

from echo_ray.client import EchoClient
from echo_ray.errors import Forbidden, SessionNotFound, Unauthenticated

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ON: dict[str, object] = {"access.enabled": "true", "session.drain_s": 1.0}


def test_a_service_with_access_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_RAY_TOKEN", TOKENS["both"])
    files = {k: v for k, v in asdict(section(tmp_path)).items() if k.endswith("_file") and v}
    settings = {f"access.{key}": json.dumps(value) for key, value in files.items()}
    with running_service(tmp_path, **settings, **ON) as service:

        async def test() -> None:
            file = tmp_path / "mine"
            file.write_text(TOKENS["user"] + "\n")
            async with EchoClient(service.url, token=file) as client:
                made = await client.create("a red circle", pace="max", seed=1)
                assert len(await take(client, made["id"], 0, 3)) == 3
                with pytest.raises(Forbidden):
                    await client.replicas()
                viewer = (await client.viewer_token(made["id"]))["token"]
                file.write_text(TOKENS["stranger"])
                with pytest.raises(SessionNotFound):
                    await client.get(made["id"])
            async with EchoClient(service.url, token=viewer) as client:
                assert len(await take(client, made["id"], 1, 2)) == 2
                with pytest.raises(Forbidden):
                    await client.delete(made["id"])
            async with EchoClient(service.url, token="") as client:
                with pytest.raises(Unauthenticated):
                    await take(client, made["id"], 0, 1)
            async with EchoClient(service.url) as client:
                await client.delete(made["id"])
            async with EchoClient(service.url, token=tmp_path / "nowhere") as client:
                with pytest.raises(Unauthenticated, match="cannot be read"):
                    await client.sessions()

        asyncio.run(test())
    said = service.log.read_text()
    assert not [token for token in TOKENS.values() if token in said]
