"""What goes wrong with a request, drawn from a seed: the same request meets the same fate in every run.

A *fault* is one of `KINDS`. A *permanent* fault is an answer that every request gets.
"""

import asyncio
import hashlib
from collections import Counter
from dataclasses import dataclass
from dataclasses import field as field_of
from typing import Any

from aiohttp import web

KINDS = (
    "503",  # an answer that says: again, later; nothing happened
    "429",  # likewise
    "reset",  # the connection ends before the request is looked at
    "lost",  # the request is served, and the connection ends without an answer
    "stall",  # the answer comes late
    "cut",  # the connection ends in the middle of the answer's body
    "short",  # half of the body, with a Content-Length that says that it is the whole
)
DEFAULT_KINDS = ("503", "429", "reset", "lost", "stall", "cut")


@dataclass
class Faults:
    """How requests are spoiled.

    share: of all requests, 0 to 1.
    kinds: what happens to them, each as often as the others.
    stall_s: how late a stalled answer is.
    permanent: the status that every request gets, if any.
    only: spoil only requests of these operations (`requests.Operation`), where given.
    """

    share: float = 0.0
    kinds: tuple[str, ...] = DEFAULT_KINDS
    seed: int = 0
    stall_s: float = 2.0
    permanent: int | None = None
    only: tuple[str, ...] = ()
    _seen: Counter[str] = field_of(default_factory=Counter)

    def draw(self, operation: str, request: str) -> str | None:
        """The fault of this request, or None. The n-th time that it is made is drawn apart from the others."""
        if not self.share or (self.only and operation not in self.only):
            return None
        self._seen[request] += 1
        drawn = hashlib.blake2b(f"{self.seed} {request} {self._seen[request]}".encode(), digest_size=8).digest()
        if int.from_bytes(drawn[:4], "big") >= self.share * 2**32:
            return None
        return self.kinds[int.from_bytes(drawn[4:], "big") % len(self.kinds)]


def faults_from(values: dict[str, Any]) -> Faults:
    """From JSON, where tuples are lists."""
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Faults(**known)


async def spoil(fault: str, request: web.Request, answer: web.Response) -> web.StreamResponse:
    """The answer of a served request after a fault that lets it be served: lost, cut or short."""
    body = answer.body if isinstance(answer.body, bytes) else b""
    if fault == "short" and request.method == "GET" and answer.status in (200, 206) and body:
        headers = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
        return web.Response(status=answer.status, headers=headers, body=body[: len(body) // 2])
    if fault == "cut" and body:
        await _cut(request, answer, body)
        return answer
    if fault in ("lost", "cut"):
        end_connection(request)
    return answer


async def _cut(request: web.Request, answer: web.Response, body: bytes) -> None:
    whole = web.StreamResponse(status=answer.status, headers=answer.headers)
    whole.content_length = len(body)
    await whole.prepare(request)
    await whole.write(body[: len(body) // 2])
    await asyncio.sleep(0.01)  # so that this half is sent before the connection ends
    end_connection(request)


def end_connection(request: web.Request) -> None:
    """As a host that is gone: a reset, without an answer."""
    if request.transport is not None:
        request.transport.abort()
