"""One of several processes that hold a checkpoint together: loads its share and reports its peak memory.

    python -m distillcache.tools.bench.load_share PATH --axis fsdp --process 3 --processes 8 --coordinator
    localhost:9123

All processes meet, as those of a job do; the one whose number is `--loads` then loads its share and prints one JSON
object, while the others wait: a machine that can hold one share can measure any of them. Its parts:

    share         bytes of the parameters on this process's devices
    part          of them, the largest stacked parameter
    before, peak  anonymous resident bytes before the load, and at most during it
    seconds       that it took
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from flax import nnx

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.mesh.sharding import make_mesh
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.runtime.memory import PeakMemory, anonymous_kib
from distillcache.schemas.runtime.peers import join_peers

TIMEOUT_S = 120  # of a heartbeat, with more processes than cores


def main() -> None:
    asked = _parse()
    with join_peers(asked.coordinator, asked.processes, asked.process, TIMEOUT_S) as peers:
        mesh = make_mesh(TeacherMeshConfig.model_validate({asked.axis: asked.processes}))
        if peers.number == asked.loads:
            jnp.zeros(()).block_until_ready()  # the runtime's own memory is not the checkpoint's
            print(json.dumps(measured(asked.path, mesh)), flush=True)
        peers.meet("loaded")


def measured(path: str, mesh: jax.sharding.Mesh | None) -> dict[str, float]:
    """Measure the memory of loading this process's share of a checkpoint."""
    before, start = anonymous_kib() * 1024, time.perf_counter()
    with PeakMemory() as peak:
        decoder = load_pretrained(path, mesh=mesh)
        held = [_held_bytes(leaf) for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param))]
    seconds = time.perf_counter() - start
    return {
        "share": sum(held),
        "part": max(held),
        "before": before,
        "peak": peak.gigabytes * 1e9,
        "seconds": seconds,
    }


def _held_bytes(value: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in value.addressable_shards)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="load one process's share of a checkpoint")
    parser.add_argument("path")
    parser.add_argument("--axis", default="fsdp")
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--loads", type=int, default=0)
    parser.add_argument("--coordinator", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
