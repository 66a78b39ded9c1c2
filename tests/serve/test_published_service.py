"""The published model's parts under the real service, scaled down: killed, and gone on exactly."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from converted import Converted, converted_model
from service import Service, owner_pid, running_service

from echo_ray.client import EchoClient
from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

PROMPT, OTHER = "a long road through the mountains", "the same road, but in winter"
COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted_model(tmp_path_factory.mktemp("model"), point_every=4)


@pytest.fixture(scope="module")
def service(model: Converted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    settings = {"model.preset": model.preset, "model.weights": model.weights, "model.vae": "wan"}
    with running_service(folder, **settings) as running:
        yield running


def test_a_killed_owner_costs_no_bit(service: Service, model: Converted) -> None:
    async def watch() -> tuple[list[str], int]:
        async with EchoClient(service.url) as client:
            session = await client.create(PROMPT, seed=4)
            assert (session["width"], session["height"]) == (32, 32)
            digests, switched = [], -1
            stream = client.segments(session["id"], start=0, format="raw")
            async with aclosing(stream):
                async for segment in stream:
                    digests.append(segment.metadata.digest)
                    if segment.index == 3:
                        switched = await client.send_event(session["id"], OTHER)
                    if segment.index == 6:
                        os.kill((await owner_pid(client, session["id"]))[1], signal.SIGKILL)
                    if len(digests) == COUNT:
                        break
            return digests, switched

    digests, switched = asyncio.run(watch())
    section = ModelSection(preset=str(model.preset), weights=str(model.weights), vae="wan")
    engine = build_engine(section)
    state = engine.open(PROMPT, 4)
    alone = [engine.step(state, [OTHER] if i == switched else []).digest for i in range(COUNT)]
    assert 3 < switched < COUNT
    assert digests == alone
