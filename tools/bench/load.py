"""Memory of one of eight processes that loads its share of a 30 GB checkpoint, on each of two meshes.

The checkpoint has the shapes of a 15B Llama in bfloat16, in shards with an index. Its files are sparse, all zeros, so
that they take no disk; they are read as any other. Eight processes meet as those of a job do, and one of them loads
(load_share.py).

    checkpoint_gb          all tensors
    <axis>_share_gb        the parameters of this process, an eighth, along this axis of the mesh
    <axis>_tensor_gb       of them, the largest stacked parameter
    <axis>_peak_gb         anonymous memory, at most, above that before the load
    <axis>_seconds         of the load

The goals: the peak is at most the share and one stacked parameter's part, with 3% for what else a process does.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import abstract_decoder
from distillcache.models.families import config_to_hf, layout_of
from distillcache.models.files.safetensors import TensorToWrite, header_of
from distillcache.models.files.tensors import INDEX_NAME, tensor_slots
from distillcache.schemas.config import BenchConfig
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.runtime.child_python import python_environment, python_words
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder

SLACK = 1.03
LARGE = ModelConfig(
    vocab_size=32_000,
    hidden_size=5120,
    intermediate_size=13_824,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    layers=(LayerGroup((BlockKind(),), 48),),
)


@dataclass(frozen=True)
class LoadSizes:
    """The bench's. loads: the process that loads, neither the first nor the last."""

    model: ModelConfig = LARGE
    processes: int = 8
    loads: int = 3
    shard_bytes: int = 5_000_000_000
    axes: tuple[str, ...] = ("fsdp", "tensor")


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench load`."""
    with scratch_folder(config.dir) as folder:
        return measure_load(folder, LoadSizes())


def measure_load(folder: Path, sizes: LoadSizes) -> Measured:
    """Measure with other sizes."""
    total = write_sparse(folder / "model", sizes.model, sizes.shard_bytes)
    figures, goals = {"checkpoint_gb": total / 1e9}, []
    for axis in sizes.axes:
        found = load_share(folder / "model", axis, sizes.processes, sizes.loads)
        above = found["peak"] - found["before"]
        print(f"bench: load along {axis}, {found['seconds']:.0f} s, {above / 1e9:.3g} GB at most", file=sys.stderr)
        figures |= {
            f"{axis}_share_gb": found["share"] / 1e9,
            f"{axis}_tensor_gb": found["part"] / 1e9,
            f"{axis}_peak_gb": above / 1e9,
            f"{axis}_seconds": found["seconds"],
        }
        bound = found["share"] + found["part"]
        goals.append(Goal(f"{axis}_peak_over_share_and_tensor", above / bound, SLACK, "at_most"))
    return Measured(figures, goals)


def write_sparse(folder: Path, model: ModelConfig, shard_bytes: int) -> int:
    """A bfloat16 checkpoint of zeros that takes no disk; returns the bytes of its tensors."""
    folder.mkdir()
    tensors = _tensors(model)
    shards: list[dict[str, TensorToWrite]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(each.size for each in shards[-1].values()) + tensor.size > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    listed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, _ = header_of(shard, {"format": "pt"})
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + sum(tensor.size for tensor in shard.values()))
        listed |= dict.fromkeys(shard, file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": listed}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(model, "bfloat16")))
    return sum(tensor.size for tensor in tensors.values())


def _tensors(model: ModelConfig) -> dict[str, TensorToWrite]:
    shapes = dict(nnx.to_flat_state(abstract_decoder(model)[1]))
    found = {}
    for slot in tensor_slots(model, layout_of(model)):
        shape = slot.stored_shape(shapes[slot.path].shape[len(slot.index) :])
        found[slot.name] = TensorToWrite(np.dtype(jnp.bfloat16), shape, lambda shape=shape: np.zeros(prod(shape)))
    return found


def load_share(path: Path, axis: str, processes: int, loads: int) -> dict[str, float]:
    """Return the figures of one of several processes (load_share.py), all of which run on this machine.

    Raises:
        DistillcacheError: it could not.
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    flags = "--xla_force_host_platform_device_count=1"
    environment = {**python_environment(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = [
        subprocess.Popen(
            [
                *python_words("-m", "distillcache.tools.bench.load_share", str(path)),
                *("--axis", axis, "--process", str(number)),
                *("--processes", str(processes), "--loads", str(loads), "--coordinator", coordinator),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        failed = next(number for number, process in enumerate(running) if process.returncode)
        raise DistillcacheError(
            "a process of the bench failed",
            {"process": failed, "said": said[failed][1][-500:]},
            "check that there is memory for one share, and for one JAX process each for the others",
        )
    return json.loads(said[loads][0].splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
