"""Coded taps from the build to the step: what a block is given equals the codec's own decoding of the whole stack."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.schemas.config import TapConfig, TapsConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.step.stack import StudentStack, scan_blocks
from distillcache.trainer.step.targets import TapReading, Targets, evaluation_targets, student_spans
from tests.conftest import TINY, build_config, save_teacher
from tests.rounding import assert_rounded

DEEP = replace(TINY, layers=(LayerGroup((BlockKind(),), 11),))
CODECS = {
    "int4": TapConfig(codec="int4"),
    "fp8": TapConfig(codec="fp8"),
    "int8 plain": TapConfig(codec="int8", rotate=False, group=8),
    "int8 delta": TapConfig(codec="int8", delta=True),
    "int4 delta": TapConfig(codec="int4", delta=True, keyframe_every=4),
    "int8 no keyframes": TapConfig(codec="int8", delta=True, keyframe_every=0),
}
# Mean relative error of a slot that a codec may make on these random activations; a wrong slot gives about 1.
CLOSE = {"int8": 0.02, "int4": 0.2, "fp8": 0.06}


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("deep") / "teacher", DEEP)


@pytest.fixture(scope="module", params=CODECS)
def coded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, deep_teacher: Path, corpus: Path
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("coded") / "c"
    other = "int8" if CODECS[request.param].delta else CODECS[request.param].codec
    taps = TapsConfig(resid=CODECS[request.param], attn_out=TapConfig(codec=other))
    build_cache(build_config(folder, deep_teacher, corpus, taps=taps))
    return CODECS[request.param].codec, folder


def teacher_resid(teacher: Path, batch: dict) -> np.ndarray:
    graph, state = nnx.split(load_pretrained(teacher))
    return np.asarray(resid_of(graph, state, *(batch[k] for k in ("tokens", "positions", "segment_ids"))))


@partial(jax.jit, static_argnums=0)
def resid_of(graph: Any, state: Any, *rows: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(*rows, taps=("resid",), logits=False).taps["resid"]


def given_streams(decoder: Decoder, source: CacheSource, batch: dict) -> np.ndarray:
    """The stream that each block's visit is given, `[L, B, T, D]`."""
    spans = student_spans(decoder.config, decoder.config.num_blocks, None)
    targets, reading, _ = evaluation_targets(decoder.config, spans, source, None)
    return np.asarray(visited_streams(StudentStack(decoder), reading, targets, batch))


@partial(jax.jit, static_argnums=(0, 1))
def visited_streams(stack: StudentStack, reading: TapReading, targets: Targets, batch: dict) -> jax.Array:
    def visit(place, mine, kept, given, row):
        return mine, given.resid

    nothing, shape = dict.fromkeys(stack.places(), ()), batch["segment_ids"].shape
    return scan_blocks(stack, targets, reading, batch, shape, visit, nothing, nothing, needs_mlp=False)[1][0, 0]


@pytest.mark.parametrize("blocks", [None, [3, 10]])
def test_every_block_is_given_the_teachers_stream(
    coded: tuple[str, Path], deep_teacher: Path, blocks: list[int] | None
) -> None:
    codec, folder = coded
    source = CacheSource(str(folder), blocks=blocks, leaving=False)
    batch = source[[0, 5, 2]]
    real = batch["segment_ids"] > 0
    expected, found = teacher_resid(deep_teacher, batch), given_streams(load_pretrained(deep_teacher), source, batch)
    for block in source.blocks:
        error = np.linalg.norm((found[block] - expected[block])[real]) / np.linalg.norm(expected[block][real])
        assert error < CLOSE[codec], f"block {block}"
    untrained = sorted(set(range(11)) - set(source.blocks))
    assert not found[untrained].any()


@pytest.mark.bits
def test_a_subset_of_blocks_decodes_to_the_same(coded: tuple[str, Path], deep_teacher: Path) -> None:
    decoder = load_pretrained(deep_teacher)
    whole, some = (CacheSource(str(coded[1]), blocks=blocks, leaving=False) for blocks in (None, [2, 10]))
    full, part = (given_streams(decoder, source, source[[1, 3, 4]]) for source in (whole, some))
    assert_rounded(part[[2, 10]], full[[2, 10]])


def test_a_subset_reads_only_what_its_keyframes_need(tmp_path: Path, deep_teacher: Path, corpus: Path) -> None:
    taps = TapsConfig(resid=TapConfig(codec="int8", delta=True, keyframe_every=4))
    build_cache(build_config(tmp_path / "c", deep_teacher, corpus, taps=taps))
    source = CacheSource(str(tmp_path / "c"), blocks=[6, 9], leaving=False)
    codes, key = (part for part in source.taps["resid"].parts if part.part in ("codes", "key"))
    assert [slot for _, slot in source.reads["resid"].of_part(codes)] == [4, 5, 6, 8, 9]
    assert source.reads["resid"].of_part(key) == [(0, 1), (1, 2)]
    assert source.reads["resid"].at == {6: 2, 9: 5}
    assert source[[0]]["resid"]["codes"].shape[0] == 6


def test_coded_caches_are_smaller(coded: tuple[str, Path]) -> None:
    """Scales and keyframes included, at this hidden size of 24: one group of a scale byte and an exponent byte."""
    source = CacheSource(str(coded[1]))
    bf16 = 2 * 24 * (len(source.taps["resid"].slots) + len(source.taps["attn_out"].slots))
    assert source.plan.bytes_per_token <= {"int8": 0.75, "int4": 0.75, "fp8": 0.6}[coded[0]] * bf16


def test_delta_is_for_the_stream_alone(tmp_path: Path, deep_teacher: Path, corpus: Path) -> None:
    taps = TapsConfig(attn_out=TapConfig(codec="int8", delta=True))
    with pytest.raises(ConfigError, match="for the residual stream"):
        build_cache(build_config(tmp_path / "c", deep_teacher, corpus, taps=taps))
    with pytest.raises(ConfigError, match="integer codecs"):
        build_cache(build_config(tmp_path / "c", deep_teacher, corpus, taps=TapsConfig(resid=TapConfig(delta=True))))
