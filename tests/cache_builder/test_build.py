"""Stage 1 end to end on a tiny teacher: what is stored, what is refused, what survives interruption."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import xxhash
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.record import loop as loop_module
from distillcache.cache_builder.text.token_stream import rows_fingerprint
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.lease_file import this_process_lease
from distillcache.schemas.cache.segment import open_cache, read_manifest, read_plan
from distillcache.schemas.config import DataConfig, PrepareConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import (
    CheckpointError,
    ConfigError,
    DamageError,
    DistillcacheError,
    InputError,
    Interrupted,
    NonFiniteError,
    PlanMismatchError,
    StorageError,
)
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, read_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import Plan, ShardReceipt, Stats
from distillcache.schemas.format.times import SegmentTimes
from distillcache.schemas.store.store import Store
from tests.conftest import EOS, TINY, build_config, byte_tokenizer, save_teacher
from tests.rounding import assert_rounded


def tree(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but its plan, which says when and where, what follows from that, and the shards' times."""
    files = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    others = ("plan.json", "manifest.json", "times.json")
    return {name: data for name, data in files.items() if not name.endswith(others)}


def read_tap(cache: Path, name: str) -> np.ndarray:
    """A bf16 tap `[N, S, T, D]` by plain TensorStore, without any code of ours."""
    folder = cache / "segments" / "0000" / "taps" / name
    store = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}).result()
    return store.read().result().view(ml_dtypes.bfloat16).astype(np.float32)


def test_recorded_taps_are_the_decoders_own(cache: Path, teacher: Path) -> None:
    segment = open_cache(Store(str(cache)))[0]
    rows = [segment.row(index) for index in range(segment.plan.rows.count)]
    tokens, positions, segments = (
        jnp.stack([getattr(row, name) for row in rows]) for name in ("tokens", "positions", "segment_ids")
    )
    expected = load_pretrained(teacher)(tokens, positions, segments, taps=("attn_out", "resid", "mlp_out")).taps
    for name in ("attn_out", "resid"):
        stored = read_tap(cache, name)
        # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 of the value.
        np.testing.assert_allclose(stored, np.moveaxis(np.asarray(expected[name]), 0, 1), rtol=2**-8, atol=1e-6)


def test_rows_keep_tokens_and_split(cache: Path, corpus: Path) -> None:
    segment = open_cache(Store(str(cache)))[0]
    rows = [segment.row(index) for index in range(segment.plan.rows.count)]
    text = b"".join(json.loads(line)["text"].encode() for line in corpus.read_text().splitlines())
    real = np.concatenate([row.tokens[row.segment_ids > 0] for row in rows])
    documents = len(corpus.read_text().splitlines())
    assert len(real) == len(text) + documents == segment.plan.rows.tokens
    assert [i for i, row in enumerate(rows) if row.split == "eval"] == list(segment.plan.rows.eval_indices)
    assert len(segment.plan.rows.eval_indices) == 4


def test_a_finished_cache_holds_no_traces_of_the_build(cache: Path) -> None:
    names = {path.name for path in (cache / "segments" / "0000").iterdir()}
    assert names == {"plan.json", "index.bin", "stats.json", "times.json", "side.safetensors", "rows", "taps"}
    assert not list(cache.rglob("*.__lock"))


def test_receipts_say_how_long_a_shard_took(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept of them is their sum; what is waited for is the teacher, not its compiling."""
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "finish_segment", lambda store, plan: None)
        build_cache(build_config(tmp_path / "c", teacher, corpus))
    store = Store(str(tmp_path / "c"))
    receipts = [read_canonical(store, layout.receipt_key("0000", shard), ShardReceipt) for shard in range(5)]
    seconds = [receipt.seconds for receipt in receipts if receipt is not None and receipt.seconds is not None]
    assert len(seconds) == 5
    assert all(each.compute > 0 and each.write > 0 for each in seconds)
    assert all(each.total >= max(each.compute, each.write) for each in seconds)
    build_cache(build_config(tmp_path / "c", teacher, corpus))
    times = read_canonical(store, layout.times_key("0000"), SegmentTimes)
    assert times is not None
    assert (times.shards, len(times.slowest)) == (5, 5)
    assert times.write.total == pytest.approx(sum(each.write for each in seconds), abs=1e-2)


def test_statistics_are_those_of_the_real_tokens(cache: Path, teacher: Path) -> None:
    store = Store(str(cache))
    segment = open_cache(store)[0]
    stats = from_canonical(Stats, store.read("segments/0000/stats.json") or b"", "stats").taps["resid"]
    rows = [segment.row(index) for index in range(segment.plan.rows.count)]
    arrays = [jnp.stack([getattr(row, name) for row in rows]) for name in ("tokens", "positions", "segment_ids")]
    resid = np.asarray(load_pretrained(teacher)(*arrays, taps=("resid",)).taps["resid"])
    real = resid[:, np.asarray(arrays[2]) > 0]
    np.testing.assert_allclose(stats.square_sum, np.square(real).sum(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats.abs_max, np.abs(real).max(axis=(1, 2)), rtol=1e-5)
    assert stats.count == real[0].size


def test_every_object_is_covered_by_the_index(cache: Path) -> None:
    segment = open_cache(Store(str(cache)))[0]
    plan = segment.plan
    for shard in range(plan.num_shards):
        record = segment.record(shard)
        for tap in plan.taps:
            for group in range(len(tap.parts[0].object_ranges())):
                data = (cache / layout.object_key("0000", tap.name, shard, group)).read_bytes()
                assert bytes(record[f"{tap.name}/objects"][group]).hex() == digest_bytes(data)
                assert record[f"{tap.name}/lengths"][group] == len(data)
        start, stop = plan.shard_range(shard)
        for row in range(start, stop):
            for slot in range(len(plan.taps[0].slots)):
                codes = segment.open_array(plan.taps[0].parts[0])[row, slot].read().result()
                assert xxhash.xxh3_64_intdigest(codes.copy()) == segment.chunk_digests("attn_out", row)[slot]


@pytest.mark.bits
@pytest.mark.parametrize("shard_rows", [2, 4, 8, 64])
def test_shards_may_be_smaller_or_larger_than_a_batch(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, shard_rows: int
) -> None:
    build_cache(build_config(tmp_path / "c", teacher, corpus, shard_rows=shard_rows))
    np.testing.assert_array_equal(read_tap(tmp_path / "c", "resid"), read_tap(cache, "resid"))


@pytest.mark.bits
def test_blocks_and_taps_can_be_chosen(tmp_path: Path, teacher: Path, corpus: Path, cache: Path) -> None:
    taps = TapsConfig(attn_out=None, mlp_out=TapConfig(codec="f32"))
    build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps, blocks=[1]))
    plan = open_cache(Store(str(tmp_path / "c")))[0].plan
    assert {tap.name: tap.slots for tap in plan.taps} == {"resid": (1, 2), "mlp_out": (1,)}
    # Another choice is another program, which may round elsewhere.
    assert_rounded(read_tap(tmp_path / "c", "resid"), read_tap(cache, "resid")[:, 1:3], "bf16")


def test_the_last_mlp_is_skipped_only_where_nothing_needs_it(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """`attn_out` alone needs no MLP in the last block; the numbers must not change by that."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    build_cache(build_config(both, teacher, corpus))
    build_cache(build_config(alone, teacher, corpus, taps=TapsConfig(resid=None)))
    np.testing.assert_allclose(read_tap(alone, "attn_out"), read_tap(both, "attn_out"), rtol=2**-7, atol=1e-6)


def test_building_again_changes_nothing(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    first = build_cache(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert build_cache(config) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}


@pytest.mark.bits
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_interrupted_build_ends_in_the_same_bytes(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """SIGTERM's flag is raised after so many commits; the same command then goes on."""
    commits = []
    real = loop_module.ShardWriter.add

    def add(self, shard, *arguments):
        real(self, shard, *arguments)
        commits.append(shard)
        if len(commits) > stop_after:
            jobs[0].stop.requested = True

    jobs: list = []
    real_units = loop_module._build_units
    monkeypatch.setattr(loop_module, "_build_units", lambda job: (jobs.append(job), real_units(job)))
    monkeypatch.setattr(loop_module.ShardWriter, "add", add)
    config = build_config(tmp_path / "c", teacher, corpus)
    with pytest.raises(Interrupted, match="asked to stop"):
        build_cache(config)
    assert read_manifest(Store(config.cache)) is None
    leases, receipts = (
        {path.name for path in (tmp_path / "c").rglob(f"{kind}/*.json")} for kind in ("claims", "receipts")
    )
    assert leases <= receipts  # what is unfinished was given back
    monkeypatch.undo()
    build_cache(config)
    assert tree(tmp_path / "c") == tree(cache)


def test_another_config_in_the_same_place_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    build_cache(build_config(tmp_path / "c", teacher, corpus))
    before = tree(tmp_path / "c")
    with pytest.raises(PlanMismatchError, match=r"shard_rows +there 8, here 4"):
        build_cache(build_config(tmp_path / "c", teacher, corpus, shard_rows=4))
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(PlanMismatchError, match="weights"):
        build_cache(build_config(tmp_path / "c", other, corpus))
    data = DataConfig(path=str(corpus), row_tokens=32, eval_rows=4)
    with pytest.raises(PlanMismatchError, match="row_tokens"):
        build_cache(build_config(tmp_path / "c", teacher, corpus, data=data))
    assert tree(tmp_path / "c") == before


def test_an_unfinished_cache_of_another_plan_is_refused(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "finish_segment", lambda store, plan: pytest.skip.Exception)
        build_cache(config)
    with pytest.raises(PlanMismatchError, match=r"batch_rows +there 4, here 2"):
        build_cache(build_config(tmp_path / "c", teacher, corpus, batch_rows=2))


def test_another_platform_is_refused_unless_accepted(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "_build_units", lambda job: None)
        patch.setattr(loop_module, "finish_segment", lambda store, plan: None)
        build_cache(config)
    store = Store(config.cache)
    plan = read_plan(store, "0000")
    assert plan is not None
    elsewhere = plan.model_copy(update={"numerics": plan.numerics.model_copy(update={"platform": "TPU v5e"})})
    store.write(layout.plan_key("0000"), to_canonical(elsewhere))
    with pytest.raises(PlanMismatchError, match=r"numerics\.platform"):
        build_cache(config)
    build_cache(config.model_copy(update={"accept_platform": True}))
    assert Plan.model_validate(read_plan(store, "0000")).numerics.platform == "TPU v5e"


def test_an_overflow_in_the_teacher_names_shard_row_block_and_tap(tmp_path: Path, corpus: Path) -> None:
    """Weights that are not finite are refused when they are loaded; these are finite, and their product is not."""
    folder = save_teacher(tmp_path / "huge")
    decoder = load_pretrained(folder)
    block = decoder.groups[0].blocks[0]
    for matrix in (block.mlp.up, block.mlp.down):  # block 1's MLP: seen in the stream into block 2
        matrix[...] = matrix[...].at[1].set(1e30)
    shutil.rmtree(folder)
    save_pretrained(decoder, folder)
    save_teacher_tokenizer(folder)
    with pytest.raises(NonFiniteError) as caught:
        build_cache(build_config(tmp_path / "c", folder, corpus, taps=TapsConfig(attn_out=None)))
    assert {key: caught.value.facts[key] for key in ("shard", "row", "block", "tap")} == {
        "shard": 0, "row": 0, "block": 2, "tap": "resid"
    }  # fmt: skip
    assert not list((tmp_path / "c").rglob("receipts/*"))


def save_teacher_tokenizer(folder: Path) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))


def test_a_failing_store_names_the_shard_and_leaves_receipts_true(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.write

    def write(self: Store, key: str, value: bytes) -> None:
        if key.startswith("segments/0000/taps/resid/c/2/"):
            raise StorageError("an object cannot be written", {"object": key, "cause": "No space left on device"})
        real(self, key, value)

    config = build_config(tmp_path / "c", teacher, corpus)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        with pytest.raises(StorageError, match=r"shard +2 \(rows 16 to 23\), not committed[\s\S]*No space left"):
            build_cache(config)
    receipts = sorted(path.name for path in (tmp_path / "c").rglob("receipts/*.json"))
    assert receipts == ["00000.json", "00001.json"]
    build_cache(config)
    assert tree(tmp_path / "c") == tree(cache)


def test_a_live_lease_is_respected_and_a_dead_one_is_taken(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "c"))
    first, second = Leases(store, "0000", 60), Leases(store, "0000", 60)
    assert first.take(3)
    assert not second.take(3)
    lease = json.loads((tmp_path / "c/segments/0000/claims/00003.json").read_text())
    assert lease["pid"] > 0
    first.close()  # releases what is unfinished
    assert second.take(3)
    second.done(3)
    second.close()
    assert store.read(layout.lease_key("0000", 3)) is not None  # done: its receipts speak for it


def test_a_lease_of_a_dead_process_or_an_old_heartbeat_is_taken(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "c"))
    alive = this_process_lease(expires=time.time() + 60)
    dead = alive.model_copy(update={"pid": 2**22 + 1, "started": "1"})
    elsewhere = alive.model_copy(update={"host": "elsewhere"})
    old = elsewhere.model_copy(update={"expires": 1.0})
    for unit, lease in enumerate((dead, old, elsewhere)):
        store.write(layout.lease_key("0000", unit), to_canonical(lease))
    store.write(layout.lease_key("0000", 3), b'{"half')
    leases = Leases(store, "0000", 60)
    assert [leases.take(unit) for unit in range(4)] == [True, True, False, True]
    leases.close()


def test_the_heartbeat_moves_the_expiry(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "c"))
    leases = Leases(store, "0000", 0.2)
    assert leases.take(0)
    first = json.loads(store.read(layout.lease_key("0000", 0)) or b"{}")["expires"]
    deadline = time.monotonic() + 20
    while json.loads(store.read(layout.lease_key("0000", 0)) or b"{}")["expires"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    leases.close()


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path: Path, corpus: Path) -> None:
    small = dataclasses.replace(TINY, vocab_size=200)
    folder = tmp_path / "small"
    save_pretrained(Decoder(small, rngs=nnx.Rngs(0)), folder)
    save_teacher_tokenizer(folder)
    with pytest.raises(InputError, match="tokenizer does not belong to the teacher"):
        build_cache(build_config(tmp_path / "c", folder, corpus))
    assert not (tmp_path / "c").exists()


def test_a_damaged_plan_is_named(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(cache, copy)
    plan = copy / "segments/0000/plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"shard_rows":8', b'"shard_rows":9'))
    with pytest.raises(DamageError, match=r"not what was committed|plan of a segment"):
        open_cache(Store(str(copy)))


def test_what_fails_at_the_start_leaves_nothing_and_may_be_corrected(
    tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    """Broken weights, an empty text, blocks that are not there: then the right command, with other sizes even."""
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    place = tmp_path / "c"
    wrong = [
        build_config(place, broken, corpus),
        build_config(place, teacher, empty),
        build_config(place, teacher, corpus, blocks=[9]),
        build_config(place, teacher, corpus, shard_rows=3),
        build_config(place, teacher, corpus, data=DataConfig(path=str(corpus), row_tokens=16, eval_rows=4000)),
    ]
    for config in wrong:
        with pytest.raises(DistillcacheError):
            build_cache(config)
        assert not place.exists()
    build_cache(build_config(place, teacher, corpus))


def test_rows_of_a_build_that_never_began_are_replaced(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    config = build_config(tmp_path / "c", teacher, corpus, data=DataConfig(path=str(corpus), row_tokens=32))
    tokenizer = load_tokenizer(teacher)
    wanted = config.data.model_copy(update={"eval_rows": 2})
    out = f"{config.cache}/{layout.prepared_prefix(0)}/{rows_fingerprint(wanted, tokenizer)[:16]}"
    other = DataConfig(path=str(corpus), row_tokens=16, eval_rows=4)
    prepare_rows(PrepareConfig(out=out, data=other), tokenizer=tokenizer)
    build_cache(config.model_copy(update={"data": wanted}))
    plan = read_plan(Store(config.cache), "0000")
    assert plan is not None
    assert plan.rows.row_tokens == 32


def test_a_folder_with_other_things_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="contains something else"):
        build_cache(build_config(tmp_path, teacher, corpus))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_wrong_teacher_path_is_the_teachers(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        build_cache(build_config(tmp_path / "c", tmp_path / "nope", corpus))
