"""The online source: the same bits as a cache gives, from rows alone, and one teacher for all of its sources."""

import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.config import DataConfig, PrepareConfig, TapConfig, TapsConfig, TopKConfig
from distillcache.schemas.errors import CheckpointError, ConfigError, InputError, NonFiniteError
from distillcache.schemas.format.manifest import TapPlan
from distillcache.trainer.feed import teacher as teacher_module
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from distillcache.trainer.feed.online import OnlineSource
from distillcache.trainer.feed.source import Source
from distillcache.trainer.feed.teacher import open_teacher
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.train import train
from tests.conftest import build_config, save_teacher
from tests.trainer.test_train import config as train_config
from tests.trainer.test_train import timeless

pytestmark = pytest.mark.slow  # each source compiles its own teacher

INT8_DELTA = TapsConfig(
    attn_out=TapConfig(codec="int8", group=8),
    resid=TapConfig(codec="int8", group=8, delta=True, keyframe_every=2),
)
F32 = TapsConfig(attn_out=TapConfig(codec="f32"), resid=TapConfig(codec="f32"))
# Numbers of rows around the four of a call, with repeats, from all of the cache and out of order.
PICKS = ([3], [37, 0, 5], [7, 7, 2, 30, 7], [*range(11, 22)], [37, 36, 1, 37])


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            same(found[name], value)
        else:
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def without_taps(cache: Path, folder: Path) -> str:
    """A copy of a cache that has lost all its taps."""
    copied = shutil.copytree(cache, folder / f"{cache.name}-without-taps")
    for taps in copied.glob("segments/*/taps"):
        shutil.rmtree(taps)
    assert not list(copied.glob("segments/*/taps/*"))
    return str(copied)


@pytest.fixture(scope="module")
def bf16_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "bf16", seed=3, dtype="bfloat16")


@pytest.fixture(scope="module")
def bf16_cache(tmp_path_factory: pytest.TempPathFactory, bf16_teacher: Path, corpus: Path) -> Path:
    """The default codec of a bf16 teacher: nothing is lost."""
    folder = tmp_path_factory.mktemp("cache") / "bf16"
    build_cache(build_config(folder, bf16_teacher, corpus))
    return folder


@pytest.fixture(scope="module")
def f32_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "f32"
    build_cache(build_config(folder, teacher, corpus, taps=F32))
    return folder


@pytest.fixture(scope="module")
def delta_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """Rotated int8, the stream as differences with keyframes every two slots."""
    folder = tmp_path_factory.mktemp("cache") / "delta"
    build_cache(build_config(folder, teacher, corpus, taps=INT8_DELTA))
    return folder


@pytest.mark.bits
@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("bf16_cache", False),
        ("f32_cache", False),
        ("delta_cache", False),
        ("delta_cache", True),
    ],
)
def test_the_bits_are_the_cache_s(
    name: str, exact: bool, tmp_path: Path, request: pytest.FixtureRequest, console: pytest.CaptureFixture[str]
) -> None:
    cache: Path = request.getfixturevalue(name)
    console.readouterr()  # of the build
    teacher = open_teacher(without_taps(cache, tmp_path), exact=exact)
    for blocks, leaving in ((None, True), (None, False), ([2], True), ([0, 2], False)):
        stored = CacheSource(str(cache), blocks=blocks, leaving=leaving)
        online = OnlineSource(teacher, blocks=blocks, leaving=leaving)
        assert (len(online), online.blocks, online.slots) == (len(stored), stored.blocks, stored.slots)
        assert (online.bytes_per_row, online.plan, online.digest) == (stored.bytes_per_row, stored.plan, stored.digest)
        assert {tap: reads.at for tap, reads in online.reads.items()} == {
            tap: reads.at for tap, reads in stored.reads.items()
        }
        for rows in PICKS if blocks is None else PICKS[:2]:
            batch = online[rows]
            assert all(isinstance(part, jax.Array) for tap in online.taps for part in batch[tap].values())
            same(batch, stored[rows])
    assert console.readouterr().err == ""


def test_splits_and_feeds_are_the_cache_s(bf16_cache: Path) -> None:
    teacher = open_teacher(str(bf16_cache))
    for split in ("train", "eval"):
        stored, online = CacheSource(str(bf16_cache), split=split), OnlineSource(teacher, split=split)
        assert [online.row_number(k) for k in range(len(online))] == [stored.row_number(k) for k in range(len(stored))]

        def batches(source: Source) -> list[Any]:
            with make_feed(source, global_batch_rows=6, seed=5, prefetch_batches=3) as feed:
                return [next(feed) for _ in range(7)]

        for one, two in zip(batches(online), batches(stored), strict=True):
            same(one, two)


def test_a_cache_of_several_segments(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    three = TapsConfig(mlp_out=TapConfig())
    folder = tmp_path / "grown"
    build_cache(build_config(folder, teacher, corpus))
    build_cache(build_config(folder, teacher, corpus, taps=three, extend=True))
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "another text " * 9}) + "\n")
    data = DataConfig(path=str(more), row_tokens=16, eval_rows=1)
    build_cache(build_config(folder, teacher, corpus, data=data, taps=three, extend=True))
    taps = ("resid", "mlp_out", "attn_out")
    stored = CacheSource(str(folder), taps)
    online = OnlineSource(open_teacher(without_taps(folder, tmp_path)), taps)
    assert len(list(folder.glob("segments/*"))) == 3
    assert len(online) == len(stored) > 40
    same(online[[40, 2, 38, 0, 41, 1]], stored[[40, 2, 38, 0, 41, 1]])


def test_the_logits_too(tmp_path: Path, bf16_teacher: Path, corpus: Path) -> None:
    taps = TapsConfig(topk_logits=TopKConfig(k=5))
    build_cache(build_config(tmp_path / "c", bf16_teacher, corpus, taps=taps))
    names = ("topk_logits", "resid", "attn_out")
    stored = CacheSource(str(tmp_path / "c"), names, [1], leaving=False)
    online = OnlineSource(open_teacher(without_taps(tmp_path / "c", tmp_path)), names, [1], leaving=False)
    same(online[[37, 3, 8, 3, 20]], stored[[37, 3, 8, 3, 20]])
    assert online.taps["topk_logits"].vocab_size == 257  # six of the teacher's rows are padding


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the rows of every call of the teacher."""
    calls: list[int] = []
    real = teacher_module.make_recorder

    def counted(*args: Any) -> Any:
        record, parameters = real(*args)

        def call(parameters: Any, tokens: Any, *others: Any) -> Any:
            calls.append(len(tokens))
            return record(parameters, tokens, *others)

        return call, parameters

    monkeypatch.setattr(teacher_module, "make_recorder", counted)
    return calls


def test_calls_are_build_sized_and_few(bf16_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    teacher = open_teacher(str(bf16_cache))
    source = OnlineSource(teacher)
    for rows, expected in (([1], 1), ([1, 1, 1, 1, 1], 1), ([*range(9)], 3), ([], 0)):
        calls.clear()
        assert source[rows]["resid"]["codes"].shape[:2] == (4, len(rows))
        assert calls == [4] * expected
    OnlineSource(teacher, ())[[1, 2, 3]]
    assert not calls
    exact = open_teacher(str(bf16_cache), exact=True)
    OnlineSource(exact)[[0, 3, 4, 37]]
    assert calls == [4] * 3


def test_sources_share_the_weights_and_the_program(bf16_cache: Path) -> None:
    teacher = open_teacher(str(bf16_cache))
    one, two = OnlineSource(teacher, split="train"), OnlineSource(teacher, ("attn_out",), [1], "eval")
    (first,), (second,) = one._works, two._works
    assert first.recorder is second.recorder
    held = {id(leaf) for leaf in jax.tree.leaves(teacher.decoder)}
    assert len(held) == len(jax.tree.leaves(first.recorder.parameters))


def test_threads_do_not_meet_on_the_device(delta_cache: Path) -> None:
    stored, online = CacheSource(str(delta_cache)), OnlineSource(open_teacher(str(delta_cache)))
    found: dict[int, Any] = {}

    def read(start: int) -> None:
        found[start] = online[range(start, start + 5)]

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 33, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for start, batch in found.items():
        same(batch, stored[range(start, start + 5)])


def prepared(folder: Path, teacher: Path, corpus: Path, **changes: Any) -> str:
    data = {"path": str(corpus), "tokenizer": str(teacher), "row_tokens": 16, "eval_rows": 4, **changes}
    prepare_rows(PrepareConfig(out=str(folder), data=DataConfig.model_validate(data)), rows_per_file=12)
    return str(folder)


@pytest.mark.parametrize(("name", "cache_name"), [("bf16_teacher", "bf16_cache"), ("teacher", "f32_cache")])
def test_prepared_rows_give_what_a_lossless_cache_of_them_would(
    name: str, cache_name: str, tmp_path: Path, corpus: Path, request: pytest.FixtureRequest
) -> None:
    path, cache = request.getfixturevalue(name), request.getfixturevalue(cache_name)
    rows = prepared(tmp_path / "rows", path, corpus)
    teacher = open_teacher(rows, path=str(path), batch_rows=4)
    for split in (None, "train", "eval"):
        online, stored = OnlineSource(teacher, split=split), CacheSource(str(cache), split=split)
        assert len(online) == len(stored)
        assert {tap: plan.codec for tap, plan in online.taps.items()} == {
            tap: plan.codec for tap, plan in stored.taps.items()
        }
        same(online[[3, 0, 1, 2, 3]], stored[[3, 0, 1, 2, 3]])
    np.testing.assert_array_equal(online.attention_norms(), stored.attention_norms())
    assert online.plan.rows == stored.plan.rows.model_copy(update={"text_digest": online.plan.rows.text_digest})
    assert online.digest != open_teacher(rows, path=str(path), batch_rows=8).digest


def test_other_taps_than_the_cache_s(f32_cache: Path, delta_cache: Path, tmp_path: Path, teacher: Path) -> None:
    stored = CacheSource(str(delta_cache))
    online = OnlineSource(open_teacher(without_taps(f32_cache, tmp_path), taps=INT8_DELTA))
    same(online[[9, 1, 30]], stored[[9, 1, 30]])
    np.testing.assert_array_equal(online.attention_norms(), stored.attention_norms())
    assert online.digest != CacheSource(str(f32_cache)).digest
    narrow = OnlineSource(open_teacher(str(f32_cache), dtype="bfloat16", batch_rows=2))
    assert (narrow.plan.batch_rows, narrow.plan.numerics.dtype) == (2, "bfloat16")
    codes = narrow[[9]]["resid"]["codes"]
    np.testing.assert_array_equal(codes, codes.astype(jnp.bfloat16).astype(jnp.float32))
    with pytest.raises(InputError, match="lacks this tap"):
        OnlineSource(open_teacher(str(f32_cache)), ("mlp_out",))


def test_empty_splits_and_odd_rows(sparse_cache: Path) -> None:
    teacher = open_teacher(str(sparse_cache))
    held_out = OnlineSource(teacher, split="eval")
    assert len(held_out) == 0
    with pytest.raises(InputError, match="no rows to train on"):
        make_feed(held_out, global_batch_rows=2, seed=0)
    source, stored = OnlineSource(teacher), CacheSource(str(sparse_cache))
    same(source[[30, 0]], stored[[30, 0]])
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"row {index} of"):
            source[[index]]
    with pytest.raises(InputError, match="lacks these blocks"):
        OnlineSource(teacher, blocks=[1])


def test_the_teacher_must_be_the_cache_s(bf16_cache: Path, teacher: Path, bf16_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the one that the cache was built with"):
        open_teacher(str(bf16_cache), path=str(teacher))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_teacher(str(bf16_cache), path=str(tmp_path / "nowhere"))
    moved = shutil.copytree(bf16_teacher, tmp_path / "moved")
    assert len(OnlineSource(open_teacher(str(bf16_cache), path=str(moved)))) == 38


def test_what_is_missing_is_said(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match="no cache here"):
        open_teacher(str(tmp_path))
    rows = prepared(tmp_path / "rows", teacher, corpus)
    with pytest.raises(ConfigError, match="no teacher is named"):
        open_teacher(rows)


def broken(path: Path, folder: Path, weight: float = 1e30) -> Path:
    """The teacher with a last block of finite weights whose products are not finite, or too large to be squared."""
    decoder = load_pretrained(path)
    mlp = decoder.groups[0].blocks[0].mlp
    for matrix in (mlp.up, mlp.down):
        matrix[...] = matrix[...].at[-1].set(weight)
    save_pretrained(decoder, folder, tokenizer_from=path)
    return folder


@pytest.mark.parametrize(("weight", "place"), [(1e30, "slot"), (1e12, "block")], ids=["not finite", "too large"])
def test_numbers_that_no_loss_can_be_computed_of_stop_it(
    weight: float, place: str, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    rows = prepared(tmp_path / "rows", teacher, corpus)
    online = OnlineSource(open_teacher(rows, path=str(broken(teacher, tmp_path / "broken", weight))), split="train")
    with make_feed(online, global_batch_rows=2, seed=0) as feed, pytest.raises(NonFiniteError) as caught:
        next(feed)
    assert (caught.value.facts["tap"], caught.value.facts[place]) == ("resid", 3)


def test_another_platform_is_told(
    bf16_cache: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    real = teacher_module.describe_numerics

    def elsewhere(dtype: str, taps: Iterable[TapPlan], attention: str) -> Any:
        return real(dtype, tuple(taps), attention=attention).model_copy(update={"platform": "cpu:other"})

    monkeypatch.setattr(teacher_module, "describe_numerics", elsewhere)
    open_teacher(str(bf16_cache))
    assert "may compute different bits" in (said := console.readouterr().err)
    assert "cpu:other here" in said


def test_other_bits_than_the_cache_s_are_told_once(
    delta_cache: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    source = OnlineSource(open_teacher(str(delta_cache)))
    real = Segment.chunk_digests

    def others(segment: Segment, array: str, row: int) -> list[int]:
        digests = real(segment, array, row)
        return [digests[0] ^ 1, *digests[1:]] if (array, row) == ("resid", 5) else digests

    monkeypatch.setattr(Segment, "chunk_digests", others)
    source[[4, 5]]
    source[[4, 5]]
    said = console.readouterr().err
    assert said.count("warning") == 1
    # Two rows of four slots of stream and its scales, two keyframes in two parts, three blocks of output and scales.
    assert f"1 of the first {2 * (4 + 4 + 2 + 2 + 3 + 3)} chunks differ" in said


def test_a_run_online_is_the_run_from_the_cache(tmp_path: Path, bf16_cache: Path) -> None:
    """Losses, evaluations and parameters of both modes, bit for bit; the cache's taps are gone for the online run."""
    stages = [{"mode": "blockwise", "steps": 2}, {"mode": "feature", "steps": 2}]
    values = {"loss": {"mlp": {"weight": 0.5}}, "stages": stages, "batch_rows": 6}
    found = {}
    rows_alone = shutil.copytree(bf16_cache, tmp_path / "rows", ignore=shutil.ignore_patterns("taps"))
    for source, cache in (("cache", bf16_cache), ("online", rows_alone)):
        run = tmp_path / source
        train(train_config(run, cache, source=source, **values))
        found[source] = timeless(run), read_evaluations(run), all_parameters(load_student(str(run)).decoder)
    assert found["online"][:2] == found["cache"][:2]
    for name, value in found["cache"][2].items():
        np.testing.assert_array_equal(value, found["online"][2][name], err_msg=name)
