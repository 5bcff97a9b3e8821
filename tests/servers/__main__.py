"""One object store on loopback: `python -m tests.servers gcs|s3 [--bucket NAME] [--faults SHARE] [--seed N]`.

Prints the environment in which the commands of this project (and ArrayRecord) use it, as `export`
lines, and serves until SIGINT or SIGTERM. With `--parent`, for the tests: prints JSON, ends with its standard input.
"""

import argparse
import asyncio
import json
import signal
import socket
import sys
import tempfile
from pathlib import Path

from aiohttp import ClientSession, web

from tests.servers.faults import KINDS, Faults
from tests.servers.proxy import Proxy
from tests.servers.requests import asked_of_gcs, asked_of_s3
from tests.servers.upstream import start_fake_gcs, start_moto

REGION = "us-east-1"


def environment(kind: str, front: str) -> dict[str, str]:
    """What clients of the server need, by environment variable."""
    if kind == "gcs":
        return {
            "TENSORSTORE_GCS_HTTP_URL": front,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": front,  # ArrayRecord
        }
    return {
        "AWS_ENDPOINT_URL": front,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


async def create_bucket(kind: str, front: str, name: str) -> None:
    """Buckets are made by people and their tools, never by this project."""
    async with ClientSession() as session:
        if kind == "gcs":
            request = session.post(f"{front}/storage/v1/b?project=test", json={"name": name})
        else:
            request = session.put(f"{front}/{name}")
        async with request as answer:
            answer.raise_for_status()


async def serve(arguments: argparse.Namespace) -> None:
    """Run the upstream and the proxy until told to end."""
    front = socket.socket()
    front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    front.bind(("127.0.0.1", arguments.port))
    address = f"http://127.0.0.1:{front.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        start = start_fake_gcs if arguments.kind == "gcs" else start_moto
        upstream, upstream_address = start(address, Path(folder))
        asked = asked_of_gcs if arguments.kind == "gcs" else asked_of_s3
        proxy = Proxy(upstream_address, asked, preconditions=arguments.kind == "gcs")
        runner = web.AppRunner(proxy.app(), access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, front).start()
            if arguments.bucket:
                await create_bucket(arguments.kind, address, arguments.bucket)
            proxy.faults = Faults(share=arguments.faults, seed=arguments.seed, kinds=tuple(arguments.kinds.split(",")))
            await _wait(arguments, address)
        finally:
            await runner.cleanup()
            upstream.kill()
            upstream.wait()


async def _wait(arguments: argparse.Namespace, address: str) -> None:
    values = environment(arguments.kind, address)
    print(json.dumps(values) if arguments.parent else "\n".join(f"export {k}={v}" for k, v in values.items()))
    sys.stdout.flush()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    if arguments.parent:
        loop.add_reader(sys.stdin.fileno(), ended.set)  # readable: the parent closed it, or is gone
    await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers")
    parser.add_argument("kind", choices=("gcs", "s3"))
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--bucket", help="create this bucket")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that go wrong")
    parser.add_argument("--kinds", default=",".join(Faults().kinds), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parent", action="store_true", help=argparse.SUPPRESS)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
