"""The router's web server inside a process that Ray Serve logs for."""

from __future__ import annotations

import logging
import logging.handlers

from fastapi import FastAPI

from echo_ray.config import HttpSection
from echo_ray.serve.router_service import web_server


def test_the_web_server_leaves_the_handlers_of_others_alone() -> None:
    """Serve asks its own handler for a file's name, and replaces the router if that is gone."""
    target = logging.NullHandler()
    handler = logging.handlers.MemoryHandler(1, target=target)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    try:
        web_server(FastAPI(), HttpSection())
        assert handler.target is target
    finally:
        logger.removeHandler(handler)
