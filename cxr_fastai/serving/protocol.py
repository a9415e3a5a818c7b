"""HTTP/1.1 by uvicorn, for a client who has only so many seconds to send a whole request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SENDING = (h11.IDLE, h11.SEND_BODY)
"""What a client's side is in while a request is not whole."""
PATIENCE = 3
"""How many times as long as for sending a client has between two readings of its answer."""
LINGER = (h11.SEND_BODY, h11.ERROR)
"""What it is in while more may come that nobody wants."""


class Lingering:
    """A transport that first closes its own side alone where the client is still sending: closed at once, it would
    lose the answer on its way."""

    def __init__(self, transport: asyncio.Transport, conn: h11.Connection):
        self.transport, self.conn, self.closed = transport, conn, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def close(self) -> None:
        """Close now, or when the client has ended or its time is over."""
        lingers = self.conn.their_state in LINGER and not self.closed and not self.transport.is_closing()
        self.closed = True
        if lingers:
            self.transport.write_eof()
        else:
            self.transport.close()


class PromptProtocol(H11Protocol):
    """Cuts the connection `seconds` after a request's first byte, or after connecting, unless the request is whole; and
    `PATIENCE` times as long after an answer has stopped being read.

    uvicorn itself waits for ever for the rest of a header or a body, and for a client who takes its answer.
    """

    def __init__(self, *args: Any, seconds: float = 10, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds, self.deadline, self.unread = seconds, None, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Lingering(transport, self.conn))
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.closed:
            return  # the rest of a request that has its answer
        if self.deadline is None and self.conn.their_state in SENDING:
            self._wait()
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state not in (*SENDING, *LINGER):
            self._stop()
        if (before, self.conn.their_state) == (h11.SEND_BODY, h11.IDLE):  # that has its answer: the next one's time
            self._stop()
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which may begin the next request, that came with this one
        if self.deadline is None and self.conn.their_state is h11.SEND_BODY:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(PATIENCE * self.seconds, self._cut)

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
        self.unread = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self.unread is not None:
            self.unread.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in the words of every other refusal."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.close()
        body = json.dumps({'code': 'E_HTTP', 'message': msg}).encode()
        headers = [('content-type', 'application/json'), ('content-length', str(len(body))), ('connection', 'close')]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _wait(self) -> None:
        self.deadline = self.loop.call_later(self.seconds, self._cut)

    def _stop(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None

    def _cut(self) -> None:
        self.deadline = None
        self.transport.abort()
