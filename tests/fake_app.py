"""The service with a fake engine behind its replicas, as a Serve config file would name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from echo_ray.serve.app import application


def build(args: Mapping[str, Any]) -> Application:
    return application(args, engine="fakes:build_fake_engine")
