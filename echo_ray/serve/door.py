"""An HTTP server on a thread and an event loop of its own, whose address is known beforehand."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn

from echo_ray.errors import UnavailableError

START_TIMEOUT_S = 10.0


class _Server(uvicorn.Server):
    """Says when it accepts connections."""

    def __init__(self, config: uvicorn.Config, accepting: threading.Event) -> None:
        super().__init__(config)
        self._accepting = accepting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._accepting.set()


class Door:
    """Serves one ASGI application; `address` is known before anything is accepted."""

    def __init__(self, app: Any, ip: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        # asyncio switches Nagle's algorithm off only where the protocol is named: 40 ms a message.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # A fixed port must be free again at once when the process before this one was killed.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((ip, port))
            # Nothing is accepted yet, but a second replica on a fixed port is refused from here.
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise UnavailableError(
                f"http.replica_port: cannot listen at {ip} port {port}: {error.strerror or error}; "
                "run one replica a node, or set it to 0"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self.address = f"[{ip}]:{self.port}" if ":" in ip else f"{ip}:{self.port}"
        self._accepting = threading.Event()
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",
                access_log=False,
                lifespan="off",
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                # A router whose machine is gone says nothing; without this its pull stays for ever.
                ws_ping_interval=5.0,
                ws_ping_timeout=10.0,
                ws_max_size=2**16,
                timeout_graceful_shutdown=1,
            ),
            self._accepting,
        )
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def start(self) -> None:
        """Accept connections; returns when it does."""
        self._thread.start()
        if not self._accepting.wait(START_TIMEOUT_S):
            raise UnavailableError(f"the server at {self.address} did not start")

    def stop(self, timeout_s: float = 5.0) -> None:
        """Close what is open and end the thread."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._socket.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))
