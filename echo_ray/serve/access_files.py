"""Secrets and tables of tokens: read from the environment or from files that may change meanwhile.

A file that has changed is read again at its next use, so tokens and secrets rotate without a
restart. One that can't be read any more, or is not understood, changes nothing: what was read last
goes on, and the log says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from echo_ray.clock import Clock
from echo_ray.errors import ConfigError
from echo_ray.serve.telemetry import log

T = TypeVar("T")
LOOK_S = 1.0
"""A file is looked at this often."""
SECRET_CHARS = 32
"""Shorter secrets are refused."""
MAX_FILE_BYTES = 2**24


class WatchedFile(Generic[T]):
    """What `parse` makes of a file's text. Opening raises `ConfigError`."""

    def __init__(self, key: str, path: str, parse: Callable[[str], T], clock: Clock) -> None:
        self._key = key
        self._path = Path(path)
        self._parse = parse
        self._clock = clock
        self._looked_s = clock.monotonic()
        self._seen, self._value = self._read()

    @property
    def value(self) -> T:
        now_s = self._clock.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._look()
        return self._value

    def _look(self) -> None:
        seen = self._stamp()
        if seen == self._seen:
            return
        try:
            self._seen, self._value = self._read()
        except ConfigError as error:
            self._seen = seen
            log(logging.ERROR, "access_file_kept", key=self._key, error=error.message)
        else:
            log(logging.INFO, "access_file_read", key=self._key)

    def _read(self) -> tuple[object, T]:
        seen = self._stamp()
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"{self._key}: {self._path} cannot be read: {error.strerror or error}",
                param=self._key,
            ) from error
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(
                f"{self._key}: {self._path} has more than {MAX_FILE_BYTES} bytes; name another",
                param=self._key,
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._key}: {self._path} is not UTF-8 text at byte {error.start}",
                param=self._key,
            ) from error
        return seen, self._parse(text)

    def _stamp(self) -> object:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


class Secret:
    """One or more secrets: the first is used, all of them are accepted, so that they can rotate."""

    def __init__(self, key: str, env: str | None, file: str | None, clock: Clock) -> None:
        """`key`: `access.viewer_secret` or the like. Raises `ConfigError` without a secret."""
        self._file: WatchedFile[tuple[bytes, ...]] | None = None
        self._fixed: tuple[bytes, ...] = ()
        if env is not None:
            text = os.environ.get(env, "")
            if not text.strip():
                raise ConfigError(
                    f"{key}_env: the variable {env} is not set; set it for every process",
                    param=f"{key}_env",
                )
            self._fixed = _secrets(f"{key}_env", text)
        elif file is not None:
            where = f"{key}_file"
            self._file = WatchedFile(where, file, lambda text: _secrets(where, text), clock)

    @property
    def accepted(self) -> tuple[bytes, ...]:
        """All of them; none if no secret was asked for."""
        return self._fixed if self._file is None else self._file.value


def _secrets(key: str, text: str) -> tuple[bytes, ...]:
    found = tuple(line.encode() for line in text.split())
    if not found:
        raise ConfigError(f"{key}: there is no secret in it; write one a line", param=key)
    if any(len(secret) < SECRET_CHARS for secret in found):
        # The value is not told.
        raise ConfigError(
            f"{key}: a secret is shorter than {SECRET_CHARS} characters; make one with "
            "`openssl rand -hex 32`",
            param=key,
        )
    return found
