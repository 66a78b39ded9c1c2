"""What one stream of the client has read, over however many connections it takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from echo_ray import wire
from echo_ray.errors import EchoError, MessageError


@dataclass(frozen=True, slots=True)
class Segment:
    """One chunk of a stream."""

    metadata: wire.ChunkMetadata
    data: bytes

    @property
    def index(self) -> int:
        return self.metadata.chunk_index


class Reader:
    """Checks what comes: each index once and in order, raw segments against their digests."""

    def __init__(
        self, format: str, start: int | None, on_message: Callable[[wire.Message], None] | None
    ) -> None:
        self.format = format
        self.next = start
        self.refusal: EchoError | None = None
        self._tell = on_message

    async def read(self, socket: ClientConnection) -> AsyncIterator[Segment]:
        """Segments of one connection, each acknowledged when the next one is asked for."""
        self.refusal = None
        announced: wire.ChunkMetadata | None = None
        async for received in socket:
            if isinstance(received, bytes):
                segment = self._checked(announced, received)
                announced = None
                yield segment
                with contextlib.suppress(ConnectionClosed):
                    # What was received before the close is still to be read, the reason included.
                    await socket.send(wire.encode(wire.Ack(chunk_index=segment.index)))
                continue
            message = wire.parse_server(received)
            if isinstance(message, wire.ChunkMetadata):
                announced = message
                continue
            if message is not None and self._tell is not None:
                self._tell(message)
            if isinstance(message, wire.Done):
                return
            if isinstance(message, wire.VideoStart) and self.next is None:
                self.next = message.start
            if isinstance(message, wire.ErrorMessage):
                self.refusal = wire.error_from(json.loads(received))
        # A close that is no error ends the loop above; without `Done` the session goes on.
        raise socket.protocol.close_exc

    def _checked(self, metadata: wire.ChunkMetadata | None, data: bytes) -> Segment:
        if metadata is None:
            raise MessageError(f"a segment of {len(data)} bytes came without its metadata")
        index = metadata.chunk_index
        if index != self.next:
            raise MessageError(f"chunk {index} came where {self.next} was due")
        if len(data) != metadata.byte_length:
            raise MessageError(
                f"chunk {index} has {len(data)} bytes; {metadata.byte_length} were announced"
            )
        if self.format == "raw" and hashlib.sha256(data).hexdigest() != metadata.digest:
            raise MessageError(f"chunk {index} does not match its digest {metadata.digest}")
        self.next = index + 1
        return Segment(metadata, data)


def worth_a_retry(error: Exception, refusal: EchoError | None) -> bool:
    """Whether a stream that broke like this may be connected again."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code >= 500
    if refusal is None:
        return True
    code = error.rcvd.code if isinstance(error, ConnectionClosed) and error.rcvd else None
    return refusal.retryable or code not in (1008, 1009)
