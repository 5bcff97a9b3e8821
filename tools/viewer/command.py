"""`distillcache serve`: show a cache or a run in the browser, on this machine alone unless configured otherwise.

distillcache serve caches/mine
distillcache serve gs://bucket/runs/cut --port 0
"""

import contextlib
import errno
import importlib.util
import json
import socket
import sys
from collections.abc import Sequence

import jax

from distillcache.schemas import command_line
from distillcache.schemas.config.serve import ServeConfig
from distillcache.schemas.errors import ConfigError, install_advice
from distillcache.schemas.store.store import Store, using
from distillcache.tools.report.command import kind_of

PACKAGES = ("starlette", "uvicorn")
FAREWELL_S = 2  # for answers under way when it is ended


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Serve until Ctrl-C; the address goes to standard output, with `as_json` as one JSON object.

    Raises:
        ConfigError: the packages are missing, or the address cannot be used.
        InputError: there is neither a cache nor a run.
    """
    config = command_line.parse(ServeConfig, argv, command, positional=("target",))
    check_packages()
    check_host(config)
    # A GPU's memory is for the build or the training that is being watched.
    jax.config.update("jax_platforms", "cpu")
    with using(config.storage), listening(config.host, config.port) as ear:
        kind = kind_of(Store(config.target))
        url = address_of(ear, config.host)
        if config.expose:
            print(
                f"warning: everyone who can reach {url} can read everything in {config.target}: there is no password",
                file=sys.stderr,
            )
        _serve(config, kind, ear, url, as_json)


def _serve(config: ServeConfig, kind: str, ear: socket.socket, url: str, as_json: bool) -> None:
    import uvicorn  # these belong to an extra

    from distillcache.tools.viewer.app import make_app
    from distillcache.tools.viewer.guard import own_names

    names = (*config.names, *(own_names() if config.expose else ()))
    app = make_app(kind, config.target, names, config.expose)
    told = {"url": url, "target": config.target, "of": kind}
    print(json.dumps(told) if as_json else f"{url}  the {kind} {config.target}; Ctrl-C ends it", flush=True)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=FAREWELL_S,
        )
    )
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it is done
        server.run(sockets=[ear])


def check_packages() -> None:
    """Raise `ConfigError` where the viewer's packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "the viewer needs packages that are not installed",
            {"missing": ", ".join(missing)},
            install_advice("serve"),
        )


def check_host(config: ServeConfig) -> None:
    """Raise `ConfigError` where other machines could read everything and --expose is not set."""
    if not config.expose and not is_loopback(config.host):
        raise ConfigError(
            "other machines could read everything at this address",
            {"host": config.host},
            "leave --host out (and use `ssh -L` from other machines), or allow it with --expose",
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(str(where[0]).startswith("127.") or where[0] == "::1" for *_, where in found)


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a taken port is reported before anything is read.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ear = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("there is no such address on this machine", {"host": host, "cause": error}) from error
    try:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a viewer that has just ended is no hindrance
        ear.bind(where)
        ear.listen()
    except OSError as error:
        ear.close()
        taken = error.errno == errno.EADDRINUSE
        raise ConfigError(
            "another program uses this port" if taken else "the server cannot listen at this address",
            {"host": host, "port": port, "cause": error.strerror or error},
            "choose another with --port; --port 0 takes any free port",
        ) from error
    return ear


def address_of(ear: socket.socket, host: str) -> str:
    """`http://127.0.0.1:8321/`."""
    return f"http://{f'[{host}]' if ':' in host else host}:{ear.getsockname()[1]}/"
