"""Connections whose clients do nothing, or next to nothing, are given up: those that do not end a head, or do not read
their answers."""

from __future__ import annotations

import asyncio
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_SECONDS = 20.0
STALLED_SECONDS = 5.0  # after which a connection makes room for another
READING_SECONDS = 60.0  # for an answer, and what its size takes at this pace:
_BYTES_PER_SECOND = 16 << 10
_LOOK_SECONDS = 1.0


class WatchedProtocol(H11Protocol):
    """uvicorn's protocol, which looks every second at what its client does."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unsent, self._head_begun = 0, False
        self._head_since = self._received = self._sent = self._read_by = time.monotonic()
        self._looking = self.loop.call_later(_LOOK_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received = time.monotonic()
        super().data_received(data)
        self._note_head()

    def resume_writing(self) -> None:
        self._sent = time.monotonic()
        super().resume_writing()

    @property
    def answered(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def makes_room(self) -> bool:
        """Whether it may be closed for another one: it waits for a request, or its client does nothing."""
        self._note_sent()
        now = time.monotonic()
        if self._unsent:
            return now - self._sent > STALLED_SECONDS
        unfinished = self.conn.their_state is h11.SEND_BODY
        return self.answered or (unfinished and now - self._received > STALLED_SECONDS)

    def _look(self) -> None:
        self._looking = self.loop.call_later(_LOOK_SECONDS, self._look)
        self._note_sent()
        self._note_head()
        now = time.monotonic()
        if self._unsent and (now - self._sent > PATIENCE_SECONDS or now > self._read_by):
            self.transport.abort()  # close would wait until everything is sent
        elif self._head_begun and now - self._head_since > PATIENCE_SECONDS and not self.transport.is_closing():
            self.transport.close()

    def _note_sent(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if not self._unsent:
            self._read_by = time.monotonic() + READING_SECONDS
        self._read_by += max(unsent - self._unsent, 0) / _BYTES_PER_SECOND
        if not self._unsent or unsent < self._unsent:
            self._sent = time.monotonic()
        self._unsent = unsent

    def _note_head(self) -> None:
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun and not self._head_begun:
            self._head_since = time.monotonic()
        self._head_begun = begun
