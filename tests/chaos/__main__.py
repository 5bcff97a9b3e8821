"""`python -m tests.chaos [--seconds 120] [--processes 4] [--faults 0.1] [--seed 0]`: what happened, as JSON.

Exit code 1 where a cache did not come out as it must.
"""

import argparse
import json
import sys

from tests.chaos.builders import run
from tests.servers.launch import Server


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="kills builders over a failing store")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--faults", type=float, default=0.1, help="share of requests that go wrong")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    server = Server("gcs")
    try:
        chaos = run(
            server, arguments.seconds, processes=arguments.processes, faults=arguments.faults, seed=arguments.seed
        )
    finally:
        server.close()
    print(json.dumps(chaos.__dict__, indent=2))
    sys.exit(bool(chaos.problems))


if __name__ == "__main__":
    main()
