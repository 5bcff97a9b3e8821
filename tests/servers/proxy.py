"""The proxy in front of an object store: preconditions, faults, counts, and an address to set and read them.

GET    /_control/requests      what was asked since the last DELETE of it
DELETE /_control/requests
PUT    /_control/faults        the fields of `faults.Faults` as JSON
"""

import asyncio
import collections
import re
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from yarl import URL

from tests.servers.faults import Faults, end_connection, faults_from, spoil
from tests.servers.requests import Asked, Requests

OF_ONE_HOP = {"connection", "content-length", "expect", "host", "keep-alive", "transfer-encoding"}


class Proxy:
    """One upstream. `preconditions`: enforce generations, which fake-gcs-server ignores on media uploads."""

    def __init__(self, upstream: str, asked: Callable[[web.Request], Asked], *, preconditions: bool) -> None:
        self._upstream, self._asked, self._preconditions = upstream, asked, preconditions
        self._locks: dict[tuple[str, str], asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        self.faults, self.requests = Faults(), Requests()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 31)
        app.cleanup_ctx.append(self._session_of)
        app.router.add_get("/_control/requests", self._counts)
        app.router.add_delete("/_control/requests", self._clear)
        app.router.add_put("/_control/faults", self._set_faults)
        app.router.add_route("*", "/{rest:.*}", self._serve)
        return app

    async def _session_of(self, _: web.Application) -> AsyncIterator[None]:
        options = {"timeout": ClientTimeout(120), "auto_decompress": False, "cookie_jar": DummyCookieJar()}
        async with ClientSession(connector=TCPConnector(limit=64), **options) as self._session:
            yield

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        asked = self._asked(request)
        if self.faults.permanent is not None:
            self.requests.add(asked, self.faults.permanent, 0)
            return web.Response(status=self.faults.permanent, text=f"answer {self.faults.permanent} to everything")
        # Buckets are numbered as tests happen to run: the draw is not to depend on it.
        path = re.sub(r"bucket-\d+", "bucket", request.raw_path)
        fault = self.faults.draw(asked.operation, f"{request.method} {path}")
        if fault is not None:
            self.requests.faults[fault] += 1
        body = await request.read()
        if fault == "reset":
            end_connection(request)
            return web.Response(status=500)
        if fault in ("503", "429"):
            self.requests.add(asked, int(fault), 0)
            return web.Response(status=int(fault), text="try again later")
        if fault == "stall":
            await asyncio.sleep(self.faults.stall_s)
        try:
            answer = await self._answer(request, asked, body)
        except ClientError as error:  # the upstream closed an idle connection: as a real store's front end would say
            answer = web.Response(status=502, text=str(error))
        moved = len(body) if asked.operation == "write" else len(answer.body or b"")  # type: ignore[arg-type]
        self.requests.add(asked, answer.status, moved)
        return answer if fault in (None, "stall") else await spoil(fault, request, answer)

    async def _answer(self, request: web.Request, asked: Asked, body: bytes) -> web.Response:
        wanted, unwanted = (request.query.get(f"ifGeneration{name}") for name in ("Match", "NotMatch"))
        reading = request.method in ("GET", "HEAD")
        if not self._preconditions or not asked.key or (reading and wanted is None and unwanted is None):
            return await self._forward(request, body)
        async with self._locks[asked.bucket, asked.key]:  # every change of a key waits, conditional or not
            if wanted is not None or unwanted is not None:
                found = await self._generation(asked)
                if wanted is not None and found != wanted:
                    return web.json_response({"error": {"code": 412, "message": "conditionNotMet"}}, status=412)
                if unwanted is not None and found == unwanted:
                    return web.Response(status=304 if reading else 412)
            return await self._forward(request, body)

    async def _generation(self, asked: Asked) -> str:
        address = f"{self._upstream}/storage/v1/b/{asked.bucket}/o/{quote(asked.key, safe='')}"
        async with self._session.get(URL(address, encoded=True)) as answer:
            return (await answer.json())["generation"] if answer.status == 200 else "0"

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in OF_ONE_HOP}
        address = URL(self._upstream + request.raw_path, encoded=True)
        asking = self._session.request(request.method, address, headers=headers, data=body, allow_redirects=False)
        async with asking as answer:
            data = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in OF_ONE_HOP}
            if request.method == "HEAD" and "Content-Length" in answer.headers:
                kept["Content-Length"] = answer.headers["Content-Length"]
            return web.Response(status=answer.status, body=data, headers=kept)

    async def _counts(self, _: web.Request) -> web.Response:
        return web.json_response(self.requests.as_json())

    async def _clear(self, _: web.Request) -> web.Response:
        self.requests.clear()
        return web.Response()

    async def _set_faults(self, request: web.Request) -> web.Response:
        self.faults = faults_from(await request.json())
        return web.Response()
