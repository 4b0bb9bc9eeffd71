"""Connections that ask for nothing are closed: a slow header would hold one for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

SILENT_S = 90.0  # nodes ask every two seconds


class Protocol(H11Protocol):
    """HTTP that closes a connection which begins no request for `SILENT_S` to twice as long."""

    _looked_at: RequestResponseCycle | None = None
    _looks = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch a new connection."""
        super().connection_made(transport)
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        idle = cycle is None or cycle.response_complete
        if self._looks and idle and cycle is self._looked_at:
            self.transport.close()
            return
        self._looked_at = cycle
        self._looks += 1
        self.loop.call_later(SILENT_S, self._look)
