"""Small decoders and checkpoints that the tests of this folder share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.mesh.sharding import device_copy, make_mesh, parameter_sharding
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.store.store import Store

GOLDEN = Path(__file__).parent.parent / "golden"
CACHED_TEACHER = Path("~/.cache/distillcache/SmolLM2-135M-Instruct.Q4_1.gguf").expanduser()


def transformers_model(folder: Path, **options: Any) -> Any:
    """What transformers' class that the config names reads of a checkpoint; not every family is known to its
    `AutoModelForCausalLM`."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options)


def upload(folder: Path, url: str) -> str:
    """Copy the files of a folder into a bucket; returns where they are."""
    for file in folder.iterdir():
        Store(url).write(file.name, file.read_bytes())
    return url


def randomized(decoder: Decoder, seed: int = 0) -> Decoder:
    """Norm weights and biases away from 1 and 0, where a missing one would not show."""
    noise = np.random.default_rng(seed)
    graph, state = nnx.split(decoder)
    out = []
    for path, value in nnx.to_flat_state(state):
        old = np.asarray(value.get_value())
        if str(path[-1]).endswith(("norm", "_bias")):
            old = (old + 0.3 * noise.standard_normal(old.shape)).astype(old.dtype)
        out.append((path, value.replace(device_copy(old))))
    return nnx.merge(graph, nnx.from_flat_state(out))


def on_mesh(decoder: Decoder, **sizes: int) -> nnx.State:
    """The decoder's parameters cut over a mesh by their names alone."""
    mesh = make_mesh(TeacherMeshConfig(**sizes))
    assert mesh is not None
    return nnx.from_flat_state(
        [
            (path, value.replace(jax.device_put(value.get_value(), parameter_sharding(mesh, name, value.shape))))
            for path, value in nnx.to_flat_state(nnx.state(decoder))
            for name in ["/".join(map(str, path))]
        ]
    )


@pytest.fixture
def tiny_config() -> ModelConfig:
    """No two axes of one size, so that a swapped axis cannot pass."""
    return ModelConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=40,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        layers=(LayerGroup((BlockKind(),), 3),),
        norm_eps=1e-5,
        max_positions=64,
    )


@pytest.fixture
def tiny(tiny_config: ModelConfig) -> Decoder:
    return randomized(Decoder(tiny_config))


@pytest.fixture
def tiny_biased(tiny_config: ModelConfig) -> Decoder:
    return randomized(Decoder(replace(tiny_config, qkv_bias=True, output_bias=True, mlp_bias=True)))


@pytest.fixture
def demo_teacher() -> Path:
    """The quantised SmolLM2-135M-Instruct, where it has been fetched."""
    if not CACHED_TEACHER.exists():
        pytest.skip(f"the demo teacher is not at {CACHED_TEACHER}")
    return CACHED_TEACHER
