"""A real S3 server for tests, and a door in front of it where answers can be spoiled.

The server is moto's, as a process of its own on a loopback port. Its fixtures are in `s3_fixtures`.
"""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from ports import free_port

from echo_ray.storage.s3_snapshots import S3Snapshots

START_S = 40.0
REGION = "us-east-1"
SECRET = "the-secret-key-of-tests"
_numbers = itertools.count(1)


class S3Server:
    """Moto's server as a child process."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
        )
        until = time.monotonic() + START_S
        while not _answers(f"{self.url}/moto-api/"):
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                pytest.fail(f"moto's server did not start at {self.url} within {START_S:g} s")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, service: str = "s3") -> Any:
        """A client with all rights."""
        session = boto3.Session("root", SECRET, region_name=REGION)
        config = Config(
            s3={"addressing_style": "path"}, request_checksum_calculation="when_required"
        )
        return session.client(service, endpoint_url=self.url, config=config)

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"bucket-{next(_numbers)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def check_rights(self, checked: bool) -> None:
        """From now on refuse unknown keys, wrong signatures and missing rights, or nothing."""
        count = "0" if checked else "inf"
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=count.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=5).close()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


@dataclass
class Door:
    """A proxy in front of the server. `spoil` may answer a request itself, or change an answer."""

    url: str
    seen: list[str] = field(default_factory=list)
    """`METHOD /path?query` of every request."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of every request, with small letters."""
    spoil: Callable[[str], tuple[int, bytes] | None] = lambda _: None
    """From `METHOD /path?query` to status and body, or None to let the server answer."""
    change: Callable[[str, bytes], bytes] = lambda _, body: body
    """What is sent in place of the body of an answer."""


def error(status: int, code: str, message: str = "told by a test") -> tuple[int, bytes]:
    """An S3 error answer."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return status, b'<?xml version="1.0" encoding="UTF-8"?>' + body.encode()


def answering(reply: tuple[int, bytes], *methods: str) -> Callable[[str], tuple[int, bytes] | None]:
    """For `Door.spoil`: that reply to requests of these methods, or to all."""
    return lambda what: reply if not methods or what.split()[0] in methods else None


def serve_door(server_url: str, door: Door) -> ThreadingHTTPServer:
    target = urlsplit(server_url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            # A request that outlives its test finds the server, or who asked, gone.
            with suppress(OSError):
                self._answer()
            self.close_connection = True

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            what = f"{self.command} {self.path}"
            door.seen.append(what)
            door.headers.append({k.lower(): v for k, v in self.headers.items()})
            spoiled = door.spoil(what)
            if spoiled is None:
                status, headers, answer = self._ask(body)
            else:
                (status, answer), headers = spoiled, {}
            sent = door.change(what, answer)
            self.send_response(status)
            whole = {"content-length": str(len(answer)), **headers, "connection": "close"}
            for name, value in whole.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(target, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            headers = {
                k.lower(): v
                for k, v in answer.getheaders()
                if k.lower() not in ("connection", "transfer-encoding", "date", "server")
            }
            connection.close()
            if self.command != "HEAD":
                headers.pop("content-length", None)
            return answer.status, headers, data

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def snapshots(url: str, bucket: str, **changes: Any) -> S3Snapshots:
    """A store in that bucket; credentials come from the environment."""
    settings = {"endpoint": url, "region": REGION, "path_style": True, "timeout_s": 20.0, **changes}
    return S3Snapshots(bucket, **settings)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True
