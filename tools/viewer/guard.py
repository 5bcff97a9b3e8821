"""Access control of the viewer, and headers of every response.

Pages of the web that a reader visits can send requests to this machine too. They cannot read the answers, unless they
make their own name point here (DNS rebinding): so a request must name a host that is ours. An address is no name, and
cannot be made to point elsewhere.
"""

import ipaddress
import socket
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distillcache.tools.viewer.page import POLICY

HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
REFUSED = "This viewer does not answer to this host name. If the name is yours, allow it with --names.\n"


class Guard:
    """Refuses requests for foreign hosts, and adds the headers."""

    def __init__(self, app: ASGIApp, names: Collection[str], exposed: bool) -> None:
        self._app, self._names, self._exposed = app, frozenset(names), exposed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":  # there is nothing else to talk about
            return
        if is_ours(Headers(scope=scope).get("host", ""), self._names, self._exposed):
            await self._app(scope, receive, send_with_headers)
        else:
            await PlainTextResponse(REFUSED, 421)(scope, receive, send_with_headers)


def is_ours(host: str, names: Collection[str], exposed: bool) -> bool:
    """Return whether a Host header names this viewer.

    Args:
        names: that are allowed beside localhost.
        exposed: other machines may ask, so any address may be ours.
    """
    name = _without_port(host).lower()
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name in ("localhost", *map(str.lower, names))
    return exposed or address.is_loopback


def own_names() -> tuple[str, ...]:
    """Return the names by which other machines may reach this one."""
    return tuple(dict.fromkeys((socket.gethostname(), socket.getfqdn())))


def _without_port(host: str) -> str:
    """`[::1]:80` and `localhost:80` without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
