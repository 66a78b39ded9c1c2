"""What every file of ours has around its contents: one msgpack map, bounded and checksummed.

    {magic, size, format, ..., digest}

`magic`, `size` (of the whole file, eight bytes) and `format` stand first, at fixed places, and last
`digest`, the SHA-256 of every byte before it. That much is the same in every format, past and to
come, so what is wrong with a file is known before any of it is believed: foreign by its magic,
truncated by its size, corrupt by its digest, too new by its format. Knows nothing of contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from echo_ray.errors import EchoError

PIECE_BYTES = 2**20
MAX_TEXT_BYTES = 2**20


def pack(value: object) -> bytes:
    """A value as msgpack."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


# The head of a value whose length never changes: raw bytes, thirty-two of them.
_DIGEST_HEAD = pack("digest") + b"\xc4\x20"
_TAIL_BYTES = len(_DIGEST_HEAD) + 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """The envelope of one kind of file, and what is raised when something is wrong with it."""

    name: str
    """What the file is called."""
    magic: str
    format: int
    """The newest format that this release reads, and the one that it writes."""
    max_items: int
    """The longest list or map in it."""
    source: str
    """What to give instead of a foreign file."""
    remedy: str
    """What to do about a damaged one."""
    foreign: type[EchoError]
    truncated: type[EchoError]
    corrupt: type[EchoError]
    newer: type[EchoError]

    def close(self, parts: Sequence[bytes], pairs: int) -> tuple[int, Iterator[bytes]]:
        """The file around `pairs` packed keys and values (the format first), as size and pieces.

        Pieces have at most about a megabyte; making one takes time on a processor.
        """
        size = self._body_at + sum(len(part) for part in parts) + _TAIL_BYTES
        # A map of at most 15 keys begins with one byte.
        head = bytes([0x80 | pairs + 3]) + self._opening + size.to_bytes(8, "big")
        return size, _hashed([head, *parts])

    def open(self, data: bytes, *, limit_bytes: int) -> dict[str, Any]:
        """All of the map, if the file is whole. Raises what the envelope names."""
        self._check_whole(data)
        self._check_format(data)
        try:
            body = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=True,
                object_pairs_hook=_without_twins,
                max_bin_len=limit_bytes,
                max_str_len=MAX_TEXT_BYTES,
                max_array_len=self.max_items,
                max_map_len=self.max_items,
                max_ext_len=0,
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self.corrupt(
                f"{self.name} of {len(data)} bytes is damaged and cannot be unpacked: {error}; "
                f"{self.remedy}"
            ) from error
        if not isinstance(body, Mapping):
            raise self.corrupt(f"{self.name} is a {type(body).__name__}, not a map; {self.remedy}")
        if body.get("size") != len(data).to_bytes(8, "big"):
            raise self.corrupt(
                f"{self.name} has {len(data)} bytes, its size says otherwise; {self.remedy}"
            )
        return dict(body)

    @property
    def _magic_pair(self) -> bytes:
        return pack("magic") + pack(self.magic)

    @property
    def _opening(self) -> bytes:
        return self._magic_pair + pack("size") + b"\xc4\x08"

    @property
    def _body_at(self) -> int:
        return 1 + len(self._opening) + 8

    def _check_whole(self, data: bytes) -> None:
        pair, body_at = self._magic_pair, self._body_at
        if not pair.startswith(data[1 : 1 + len(pair)]):
            raise self._not_ours()
        if len(data) < body_at + _TAIL_BYTES:
            raise self._not_ours() if data and data[0] & 0xF0 != 0x80 else self._cut(data)
        split = len(data) - _TAIL_BYTES
        digest = hashlib.sha256(memoryview(data)[:split]).digest()
        if data[split:] == _DIGEST_HEAD + digest:
            return
        size = int.from_bytes(data[body_at - 8 : body_at], "big")
        # A file that ends as a whole one does was not cut: then it is the size that was damaged.
        if len(data) < size and not data.startswith(_DIGEST_HEAD, split):
            raise self._cut(data)
        raise self.corrupt(
            f"{self.name} of {len(data)} bytes does not match its checksum; {self.remedy}"
        )

    def _check_format(self, data: bytes) -> None:
        # The key and the longest number that msgpack knows.
        unpacker = msgpack.Unpacker()
        unpacker.feed(data[self._body_at : self._body_at + 16])
        try:
            key, version = unpacker.unpack(), unpacker.unpack()
        except (ValueError, msgpack.UnpackException) as error:
            raise self.corrupt(f"{self.name} format is unreadable; {self.remedy}") from error
        if key != "format" or type(version) is not int or version < 1:
            raise self.corrupt(f"{self.name} format {version!r:.80} is not a positive number")
        if version > self.format:
            raise self.newer(
                f"{self.name} format {version} is newer than this release reads ({self.format}); "
                "upgrade"
            )

    def _not_ours(self) -> EchoError:
        return self.foreign(
            f"not an echo_ray {self.name}: the magic is missing; give {self.source}"
        )

    def _cut(self, data: bytes) -> EchoError:
        return self.truncated(f"{self.name} ends early, after {len(data)} bytes; {self.remedy}")


def _hashed(parts: Sequence[bytes]) -> Iterator[bytes]:
    sha256 = hashlib.sha256()
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), PIECE_BYTES):
            piece = bytes(view[at : at + PIECE_BYTES])
            sha256.update(piece)
            yield piece
    yield _DIGEST_HEAD + sha256.digest()


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
