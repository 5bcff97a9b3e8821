"""Importance against the whole teacher's forward pass, and what it must not depend on."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import (
    BlockKind,
    DeltaConfig,
    LayerGroup,
    ModelConfig,
    MoeConfig,
    ShortConvConfig,
    plan_layers,
)
from distillcache.models.decoder import Decoder
from distillcache.models.layers.recurrent.short_conv import ShortConv
from distillcache.models.surgery import Scores, operate
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.config.teacher import TapConfig, TapsConfig
from distillcache.schemas.errors import ConfigError, NonFiniteError
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run import importance
from distillcache.trainer.run.importance import measure_importance, teacher_importance
from distillcache.trainer.run.student import with_choices
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.run.test_dense_families import CONFIGS

EXACT = TapsConfig(attn_out=TapConfig(codec="f32"), resid=TapConfig(codec="f32"))
# Two groups, windows, experts in some blocks, biases, norms of queries and keys.
MIXED: ModelConfig = replace(
    TINY,
    layers=(
        LayerGroup((BlockKind(window=3), BlockKind(window=3, moe=True)), 2),
        LayerGroup((BlockKind(window=3),), 1),
    ),
    moe=MoeConfig(num_experts=5, top_k=2, expert_size=12),
    qk_norm="head",
    qkv_bias=True,
    output_bias=True,
    family="qwen3_moe",
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Decoder, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    teacher = save_teacher(folder / "teacher", MIXED)
    build_cache(build_config(folder / "cache", teacher, corpus, taps=EXACT))
    return load_pretrained(teacher), folder / "cache"


@partial(jax.jit, static_argnums=0)
def mixed_heads(graph: Any, state: Any, normed: jax.Array, context: Any) -> jax.Array:
    return nnx.merge(graph, state).mix(normed, context)


def expected(decoder: Decoder, source: CacheSource, rows: int) -> Scores:
    """The same in NumPy's plain sums over the whole teacher's own tensors, each head's addition written out."""
    batch = source[list(range(rows))]
    real = batch["segment_ids"] > 0
    context = decoder.context(batch["positions"], batch["segment_ids"])
    given = {name: jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")}
    out = jax.jit(lambda given: decoder(**given, taps=("attn_out", "resid"), logits=False, router=True))(given)
    taps = {name: np.asarray(value) for name, value in out.taps.items()}
    blocks, streams, moe = [], [], 0
    for at, group, repeat, place in decoder.config.places():
        block, resid = decoder.groups[group].blocks[place], taps["resid"][at]
        graph, state = nnx.split(block.attention)
        own = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf)[repeat], state)
        normed = resid / np.sqrt(np.mean(resid**2, -1, keepdims=True) + MIXED.norm_eps)
        heads = mixed_heads(graph, own, normed * np.asarray(block.attention.norm[...])[repeat], context)
        added = np.einsum("bthk,hkd->bthd", np.asarray(heads), np.asarray(block.attention.o[...])[repeat])
        found = {"H": np.mean(np.linalg.norm(added, axis=-1)[real], axis=0)}
        if decoder.config.kinds[at].moe:
            ids, weights = np.asarray(out.router.ids[moe])[real], np.asarray(out.router.weights[moe])[real]
            found["E"] = np.array([np.sum(weights[ids == expert]) for expert in range(5)]) / real.sum()
            moe += 1
        else:
            x, mlp = resid + taps["attn_out"][at], block.mlp
            norm, gate, up, down = (np.asarray(leaf[...])[repeat] for leaf in (mlp.norm, mlp.gate, mlp.up, mlp.down))
            x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + MIXED.norm_eps) * norm
            active = (x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)
            norms = np.linalg.norm(down, axis=1)
            found["F"] = np.mean(np.abs(active[real]), axis=0) * norms
        blocks.append(found)
        square = np.mean(resid[real] ** 2, axis=0)
        streams.append(square / square.mean())
    return Scores(tuple(blocks), np.sqrt(np.mean(streams, axis=0)))


def assert_close(found: Scores, expected: Scores, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(found.stream, expected.stream, rtol=rtol)
    assert len(found.blocks) == len(expected.blocks)
    for here, there in zip(found.blocks, expected.blocks, strict=True):
        assert here.keys() == there.keys()
        for letter, value in there.items():
            np.testing.assert_allclose(here[letter], value, rtol=rtol, err_msg=letter)


def test_equals_the_whole_forward_pass(mixed: tuple[Decoder, Path]):
    """Of all training rows, the last of which is half padding, in batches that they do not fill."""
    decoder, cache = mixed
    source = CacheSource(str(cache), split="train")
    rows = len(source)
    assert rows % importance.MEASURED_ROWS
    assert (source[list(range(rows))]["segment_ids"] == 0).any()
    assert_close(measure_importance(decoder, source, rows), expected(decoder, source, rows))


@pytest.mark.slow  # a build of its own
def test_recurrent_blocks_have_value_heads(tmp_path: Path, corpus: Path):
    """Their scores are of N, which no operation on heads takes for its own."""
    delta = DeltaConfig(key_heads=2, value_heads=4, key_dim=5, value_dim=7, taps=3)
    kinds = [BlockKind(mixer="gated_delta"), BlockKind(), BlockKind(mixer="gated_delta")]
    hybrid = replace(
        TINY,
        family="qwen3_5_text",
        layers=plan_layers(kinds),
        delta=delta,
        qk_norm="head",
        norm_product="offset",
        output_gate=True,
    )
    teacher = save_teacher(tmp_path / "teacher", hybrid)
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=EXACT))
    decoder, source = load_pretrained(teacher), CacheSource(str(tmp_path / "cache"), split="train")
    scores = measure_importance(decoder, source, 4)
    assert [sorted(block) for block in scores.blocks] == [["F", "N"], ["F", "H"], ["F", "N"]]
    assert [len(scores.blocks[at][letter]) for at, letter in enumerate("NHN")] == [4, 6, 4]
    assert all((value > 0).all() for block in scores.blocks for value in block.values())
    done = operate(decoder, [SurgeryOp(op="query_heads", to=1, by="importance")], scores)
    heads = scores.blocks[1]["H"].reshape(2, 3).argmax(axis=1) + np.array([0, 3])
    assert done.kept == ([None, heads.tolist(), None],)


@pytest.mark.slow  # a build of its own
def test_short_convolutions_have_channels(tmp_path: Path, corpus: Path):
    """Of which as many are kept as of the stream's numbers, the most important of each block."""
    conv = ShortConvConfig(TINY.hidden_size, 3)
    kinds = [BlockKind(mixer="short_conv"), BlockKind()]
    config = replace(TINY, family="lfm2", layers=plan_layers(kinds), short_conv=conv, qk_norm="head")
    teacher = save_teacher(tmp_path / "teacher", config)
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=EXACT))
    decoder, source = load_pretrained(teacher), CacheSource(str(tmp_path / "cache"), split="train")
    scores = measure_importance(decoder, source, 4)
    assert [sorted(block) for block in scores.blocks] == [["C", "F"], ["F", "H"]]
    done = operate(decoder, [SurgeryOp(op="hidden_size", to=16, by="importance")], scores)
    best = np.sort(np.argsort(-scores.blocks[0]["C"])[:16])
    before, after = (each.groups[0].blocks[0].attention for each in (decoder, done.decoder))
    assert isinstance(before, ShortConv)
    assert isinstance(after, ShortConv)
    np.testing.assert_array_equal(after.conv[...], before.conv[...][:, best])


@pytest.mark.slow  # a build of its own
@pytest.mark.parametrize(
    ("family", "letters"), [("falcon_h1", ["FHN", "FHN"]), ("nemotron_h", ["F", "N", "E", "H"])], ids=str
)
def test_blocks_have_scores_of_what_they_have(family: str, letters: list[str], tmp_path: Path, corpus: Path):
    """Two mixers, one, or none; heads of Mamba-2 are kept by group."""
    teacher = save_teacher(tmp_path / "teacher", CONFIGS[family])
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=EXACT))
    decoder, source = load_pretrained(teacher), CacheSource(str(tmp_path / "cache"), split="train")
    scores = measure_importance(decoder, source, 4)
    assert ["".join(sorted(block)) for block in scores.blocks] == letters
    done = operate(decoder, [SurgeryOp(op="value_heads", to=1, by="importance")], scores)
    for block, kept in zip(scores.blocks, done.kept[0], strict=True):
        best = block["N"].reshape(2, 3).argmax(axis=1) + np.array([0, 3]) if "N" in block else None
        assert kept == (best if best is None else best.tolist())


@pytest.mark.parametrize("letter", ["H", "F"])
def test_scores_that_overflow_are_an_error(mixed: tuple[Decoder, Path], letter: str):
    """Finite weights whose squares are not: by NaN and infinity the wrong parts would be kept."""
    decoder, cache = nnx.clone(mixed[0]), mixed[1]
    block = decoder.groups[0].blocks[0]
    weights = block.attention.o if letter == "H" else block.mlp.down
    weights[...] = jnp.full_like(weights[...], 1e25)
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        measure_importance(decoder, CacheSource(str(cache), split="train"), 2)
    assert (caught.value.facts["block"], caught.value.facts["axis"]) == (0, letter)


def test_measured_once_and_kept(mixed: tuple[Decoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoder, cache = mixed
    run, calls = Store(str(tmp_path)), []
    measure = importance.measure_importance

    def counted(decoder: Decoder, source: CacheSource, rows: int) -> Scores:
        calls.append(rows)
        return measure(decoder, source, rows)

    def open_source(taps, blocks):
        return CacheSource(str(cache), taps, blocks, "train", leaving=False)

    monkeypatch.setattr(importance, "measure_importance", counted)
    first = teacher_importance(run, decoder, 5, open_source)
    again = teacher_importance(run, decoder, 5, open_source)
    assert calls == [5]
    assert_close(again, first, rtol=0)
    teacher_importance(run, decoder, 10_000, open_source)  # what lies there is of other rows
    assert calls == [5, len(CacheSource(str(cache), split="train"))]
    run.write(importance.IMPORTANCE, b"cut off")
    assert_close(teacher_importance(run, decoder, 5, open_source), first, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"taps": TapsConfig(resid=None)}, "resid"), ({"blocks": [0, 2]}, "[1]")],
    ids=["stream", "blocks"],
)
def test_what_the_cache_lacks_is_said(tmp_path: Path, teacher: Path, corpus: Path, changes: dict, named: str):
    build_cache(build_config(tmp_path / "cache", teacher, corpus, **changes))

    def open_source(taps, blocks):
        return CacheSource(str(tmp_path / "cache"), taps, blocks, "train", leaving=False)

    with pytest.raises(ConfigError, match="the cache lacks some") as caught:
        teacher_importance(Store(str(tmp_path / "run")), load_pretrained(teacher), 4, open_source)
    assert named in str(caught.value)
    assert "--extend" in caught.value.next


OPS = [
    {"op": "drop_blocks", "blocks": [0]},
    {"op": "query_heads", "to": 1},
    {"op": "kv_heads", "to": 1, "by": "weight_norm"},
    {"op": "expert_width", "to": 8},
    {"op": "upcycle", "experts": 2},
    {"op": "experts", "to": 2},
]


@pytest.mark.parametrize(
    ("ops", "init", "expected"),
    [
        (OPS, "teacher", [None, "importance", "weight_norm", None, None, None]),  # the experts were not measured
        (OPS[-1:], "teacher", ["importance"]),
        ([{**OPS[4], "how": "partition"}], "teacher", ["importance"]),
        (OPS, "random", [None, None, "weight_norm", None, None, None]),
        (OPS[-1:], "another/checkpoint", [None]),
        ([{"op": "mlp_width", "to": 8, "by": "index"}], "teacher", ["index"]),
    ],
)
def test_importance_is_the_default_where_it_is_measured(
    mixed: tuple[Decoder, Path], ops: list[dict], init: str, expected: list[str | None]
):
    given = [SurgeryOp.model_validate(op) for op in ops]
    found = with_choices(given, init, 3, lambda *args: CacheSource(str(mixed[1]), *args, "train", leaving=False))
    assert [op.by for op in found] == expected
    assert [op.by for op in with_choices(given, init, 3, None)] == [op.by for op in given]


def test_index_is_the_default_where_the_cache_lacks_a_tap(
    tmp_path: Path, teacher: Path, corpus: Path, caplog: pytest.LogCaptureFixture
):
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=TapsConfig(resid=None)))
    given = [SurgeryOp(op="query_heads", to=2), SurgeryOp(op="mlp_width", to=8)]

    def open_source(taps, blocks):
        return CacheSource(str(tmp_path / "cache"), taps, blocks, "train", leaving=False)

    assert with_choices(given, "teacher", 3, open_source) == given
    (said,) = [record.message for record in caplog.records if "index" in record.message]
    assert "by index, not by importance" in said
