"""Tiny students and random batches: what the tests of losses and steps start from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config import BuildConfig, DataConfig, TeacherConfig
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.trainer.step.blockwise import BlockwiseStep
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import ROUTER_BIAS, Parameters, all_parameters, choose_trained
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, Targets, block_targets, student_spans
from tests.conftest import build_config

# Two groups, one with a pattern of two kinds: every order of blocks that a plan can have.
MIXED = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(), BlockKind(window=3)), 2), LayerGroup((BlockKind(),), 1)),
    qkv_bias=True,
    output_bias=True,
)
EVEN = replace(MIXED, layers=(LayerGroup((BlockKind(),), 4),))  # one kind of block: a third of the time to compile

PLAIN, ADAM = BlockRules(), OptimizerConfig(learning_rate=1e-3)


def random_batch(
    config: ModelConfig, seed: int = 0, rows: int = 3, tokens: int = 10, codec: str = "bf16"
) -> dict[str, Any]:
    """A batch as a source gives it: packed rows with two documents and some padding, taps encoded, no row's alike."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, tokens), np.int32)
    segments[:, 6:] = 2
    segments[1, 8:] = 0
    positions = np.concatenate([np.arange(6), np.arange(tokens - 6)]).astype(np.int32)

    def tap(slots: int) -> dict[str, Any]:
        values = rng.normal(size=(slots, rows, tokens, config.hidden_size)).astype(np.float32)
        return dict(get_codec(codec).encode(jnp.asarray(values)))

    return {
        "tokens": rng.integers(0, config.vocab_size, (rows, tokens)).astype(np.int32),
        "positions": np.broadcast_to(positions, (rows, tokens)).copy(),
        "segment_ids": segments,
        "loss_mask": segments > 0,
        "resid": tap(config.num_blocks + 1),
        "attn_out": tap(config.num_blocks),
    }


def blockwise(
    decoder: Decoder,
    loss: LossConfig,
    *,
    blocks: Sequence[int] | None = None,
    codec: str = "bf16",
    rules: BlockRules = PLAIN,
    optimizer: OptimizerConfig = ADAM,
    steps: int = 20,
    norms: np.ndarray | None = None,
    **options: Any,
) -> tuple[BlockwiseStep, Targets]:
    """The step on batches of `random_batch`, whose stacks hold every slot at its own number."""
    depth = decoder.config.num_blocks
    spans = student_spans(decoder.config, depth, None)
    places = {"resid": {at: at for at in range(depth + 1)}, "attn_out": {at: at for at in range(depth)}}
    weights = dict.fromkeys(range(depth) if blocks is None else blocks, 1.0)
    targets = block_targets(decoder.config, spans, [places] * depth, weights, needs_leaving=rules.runs_mlp, norms=norms)
    codecs = {"resid": get_codec(codec), "attn_out": get_codec(codec)}
    reading = TapReading(codecs, decoder.config.hidden_size, in_step=False)
    made = make_optimizer(optimizer, steps)
    return BlockwiseStep(StudentStack(decoder), reading, rules, loss, made, steps, **options), targets


def parameters_of(decoder: Decoder, *patterns: str) -> tuple[Parameters, Parameters]:
    """The blocks' parameters that match, to be trained, and the others."""
    everything = {name: value for name, value in all_parameters(decoder).items() if name.startswith("groups/")}
    reached = [name for name in everything if not name.endswith(ROUTER_BIAS)]
    chosen = choose_trained(list(everything), patterns, reached)
    return (
        {name: value for name, value in everything.items() if name in chosen},
        {name: value for name, value in everything.items() if name not in chosen},
    )


@pytest.fixture(scope="session")
def mixed() -> Decoder:
    """Read only."""
    return nnx.jit(lambda: Decoder(MIXED, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="session")
def student() -> Decoder:
    """Read only: a test that changes it clones it."""
    return nnx.jit(lambda: Decoder(EVEN, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="session")
def all_rows(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """The tiny cache with no row held out: runs that are not evaluated take half of the time. Read only."""
    return cache_of_all_rows(tmp_path_factory, teacher, corpus)


def cache_of_all_rows(factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A cache of this teacher's with no row held out."""
    folder = factory.mktemp("cache") / "rows"
    build_cache(build_config(folder, teacher, corpus, data=DataConfig(path=str(corpus), row_tokens=16, eval_rows=0)))
    return folder


@pytest.fixture(scope="session")
def sparse_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """Blocks 0 and 2 of the tiny teacher, and no held-out rows."""
    folder = tmp_path_factory.mktemp("cache") / "sparse"
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=0)
    build_cache(
        BuildConfig(
            cache=str(folder),
            teacher=TeacherConfig(path=str(teacher)),
            data=data,
            blocks=[0, 2],
            batch_rows=4,
            shard_rows=8,
        )
    )
    return folder
