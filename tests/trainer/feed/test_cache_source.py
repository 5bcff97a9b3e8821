"""The source and the feed: right rows, right slots, found damage, a pure function of seed and step."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config import TapsConfig
from distillcache.schemas.errors import ConfigError, DamageError, InputError
from distillcache.schemas.store.store import Store
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from tests.conftest import build_config
from tests.rounding import assert_rounded

TAPS = ("resid", "attn_out")


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            same(value, right[name])
        else:
            np.testing.assert_array_equal(value, right[name])


def test_shapes_and_kinds(cache):
    source = CacheSource(str(cache))
    batch = source[[4, 0, 9]]
    fields = ("tokens", "positions", "segment_ids", "loss_mask")
    assert {name: (batch[name].shape, batch[name].dtype.name) for name in fields} == {
        "tokens": ((3, 16), "int32"),
        "positions": ((3, 16), "int32"),
        "segment_ids": ((3, 16), "int32"),
        "loss_mask": ((3, 16), "bool"),
    }
    hidden = source.plan.teacher.hidden_size
    assert batch["resid"]["codes"].shape == (4, 3, 16, hidden)
    assert batch["attn_out"]["codes"].shape == (3, 3, 16, hidden)
    assert all(batch[tap]["codes"].dtype == np.uint16 for tap in TAPS)
    assert "[4, B, 16, 24] uint16 (the bits of bfloat16), codec bf16" in repr(source)
    assert source.bytes_per_row == 7 * 16 * hidden * 2


@pytest.mark.bits
@pytest.mark.parametrize("codec", [{"codec": "bf16"}, {"codec": "int8", "delta": True, "keyframe_every": 2}])
def test_numbers_for_people(tmp_path, teacher, corpus, codec):
    """`decode` gives what `StoredRows` gives, slot by slot, of all blocks and of some.

    Another batch shape is another program, whose un-rotation sums in another order.
    """
    taps = TapsConfig.model_validate({"resid": codec, "topk_logits": {"k": 4}})
    build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps))
    rows = StoredRows(str(tmp_path / "c"))
    for blocks in (None, [1], [0, 2]):
        source = CacheSource(str(tmp_path / "c"), ("resid", "topk_logits"), blocks, "train")
        batch = source[[5, 0]]
        for tap in source.taps:
            found = source.decode(batch, tap)
            for place, index in enumerate((5, 0)):
                stored = rows.slots(source.row_number(index), tap, source.slots[tap])
                assert_rounded(found[:, place], np.stack([values for _, values in stored]))
    assert "34 train + 4 eval" in source._repr_html_()
    assert "[16, 4] float32 in slots 0, codec bf16, the largest 4" in repr(rows)
    assert "those for training, 34" in repr(source)
    assert "2 of 3: 0, 2" in repr(source)
    assert "<table>" in rows._repr_html_()
    with pytest.raises(InputError, match="does not read"):
        source.decode(batch, "attn_out")


def test_the_taps_are_the_teacher_s(cache, teacher):
    source, model = CacheSource(str(cache)), load_pretrained(teacher)
    batch = source[[7, 3, 7]]
    out = model(batch["tokens"], batch["positions"], batch["segment_ids"], taps=TAPS, logits=False)
    real = batch["segment_ids"] > 0
    for tap in TAPS:
        found = np.asarray(get_codec("bf16").decode(batch[tap]), np.float32)
        expected = np.asarray(out.taps[tap], np.float32)
        np.testing.assert_allclose(found[:, real], expected[:, real], rtol=1e-2, atol=1e-3)


def test_the_splits_share_the_rows(cache):
    whole, train, held_out = (CacheSource(str(cache), (), split=split) for split in (None, "train", "eval"))
    assert len(whole) == len(train) + len(held_out)
    assert len(held_out) == 4
    numbers = [[source.row_number(index) for index in range(len(source))] for source in (train, held_out)]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(whole)))
    assert numbers[0] == sorted(numbers[0])
    segment = open_cache(Store(str(cache)))[0]
    assert {segment.row(number).split for number in numbers[0]} == {"train"}
    assert {segment.row(number).split for number in numbers[1]} == {"eval"}


def bytes_read(direct):
    """By this process so far: TensorStore counts what it reads from files, the kernel what it reads for us."""
    if not direct:
        return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("direct", [True, False])
def test_some_blocks_read_only_their_slots(cache, direct):
    whole, some = CacheSource(str(cache)), CacheSource(str(cache), blocks=[2, 0], leaving=False, direct=direct)
    assert some.blocks == (0, 2)
    assert some.slots == {"resid": (0, 2), "attn_out": (0, 2)}
    full, part = whole[[1, 5]], some[[1, 5]]
    for tap in TAPS:
        np.testing.assert_array_equal(part[tap]["codes"], full[tap]["codes"][[0, 2]])
    before = bytes_read(direct)
    some[[1, 5]]
    read = bytes_read(direct) - before
    codes = sum(part[tap]["codes"].nbytes for tap in TAPS)
    # Beside the codes only the objects' indexes, 16 bytes a chunk: directly, those of the two rows; by TensorStore
    # whole ones with a checksum, each once, or once for either block of either row, as their reads happen to meet.
    of_row = [16 * some.taps[tap].parts[0].slots_per_object for tap in TAPS]
    whole_index = sum(some.plan.shard_rows * size + 4 for size in of_row)
    least, most = (2 * sum(of_row), 4 * sum(of_row) + 200) if direct else (whole_index, 4 * whole_index)
    assert codes + least <= read <= codes + most  # 200: bytes of the kernel's own answer


@pytest.mark.parametrize("integrity", [True, False])
def test_both_readers_give_the_same(cache, sparse_cache, integrity):
    for folder, rows in ((cache, [37, 3, 3, 17]), (sparse_cache, [0, 30])):
        direct, store = (CacheSource(str(folder), direct=way, integrity=integrity) for way in (True, False))
        same(direct[rows], store[rows])


def test_a_sparse_cache_has_the_slots_that_its_blocks_need(cache, sparse_cache):
    sparse = CacheSource(str(sparse_cache))
    assert sparse.slots == {"resid": (0, 1, 2, 3), "attn_out": (0, 2)}
    with pytest.raises(InputError, match="lacks these blocks"):
        CacheSource(str(sparse_cache), blocks=[1])
    with pytest.raises(InputError, match="lacks this tap"):
        CacheSource(str(sparse_cache), taps=("mlp_out",))


def test_odd_indices(cache):
    source = CacheSource(str(cache), split="eval")
    empty = source[[]]
    assert empty["tokens"].shape == (0, 16)
    assert empty["resid"]["codes"].shape[:3] == (4, 0, 16)
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"row {index} of 4"):
            source[[index]]


def test_no_cache_is_said(tmp_path):
    with pytest.raises(InputError, match="no cache here"):
        CacheSource(str(tmp_path))


def flip(folder, pattern, at):
    """Flip one bit of the first file that matches, `at` of its way through."""
    path = sorted(folder.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("place", ["taps/attn_out/c/0/*/0/0", "taps/resid/c/0/*/0/0", "rows/00000*", "index.bin"])
def test_a_flipped_bit_is_found(cache, tmp_path, place, direct):
    broken = shutil.copytree(cache, tmp_path / "cache")
    flip(broken, f"segments/0000/{place}", 0.2)
    with pytest.raises(DamageError):
        CacheSource(str(broken), direct=direct)[list(range(24))]


@pytest.mark.parametrize("direct", [True, False])
def test_a_flipped_bit_in_an_objects_index_is_found(cache, tmp_path, direct):
    broken = shutil.copytree(cache, tmp_path / "cache")
    path = next(broken.glob("segments/0000/taps/resid/c/1/0/0/0"))
    whole, rows = path.read_bytes(), list(range(8, 16))
    index = CacheSource(str(cache)).taps["resid"].parts[0].slots_per_object * 8 * 16
    for at in range(len(whole) - index - 4, len(whole) - 4, 5):
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(DamageError):
            CacheSource(str(broken), direct=direct)[rows]


@pytest.mark.parametrize("direct", [True, False])
def test_a_lost_object_is_found(cache, tmp_path, direct):
    broken = shutil.copytree(cache, tmp_path / "cache")
    next(broken.glob("segments/0000/taps/resid/c/1/*/0/0")).unlink()
    source = CacheSource(str(broken), integrity=False, direct=direct)
    source[[0]]
    with pytest.raises(DamageError, match="cannot be read") as caught:
        source[[0, 8]]
    assert caught.value.facts["row"] == 8


@pytest.mark.parametrize("direct", [True, False])
def test_a_cut_object_is_found_even_without_digests(cache, tmp_path, direct):
    broken = shutil.copytree(cache, tmp_path / "cache")
    path = next(broken.glob("segments/0000/taps/resid/c/1/*/0/0"))
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamageError):
            CacheSource(str(broken), integrity=False, direct=direct)[list(range(8, 16))]


def rows_of(batches):
    return [tuple(batch["tokens"][:, :4].ravel().tolist()) for batch in batches]


def take(feed, count):
    with feed:
        return [next(feed) for _ in range(count)]


def test_a_batch_is_a_function_of_seed_and_step(cache):
    source = CacheSource(str(cache), split="train")
    plain = take(make_feed(source, global_batch_rows=5, seed=3, prefetch_batches=0), 20)
    threaded = take(make_feed(source, global_batch_rows=5, seed=3, prefetch_batches=4, threads=3), 20)
    late = take(make_feed(source, global_batch_rows=5, seed=3, start_step=11), 9)
    other = take(make_feed(source, global_batch_rows=5, seed=4), 20)
    for one, two in zip(plain, threaded, strict=True):
        same(one, two)
    for one, two in zip(plain[11:], late, strict=True):
        same(one, two)
    assert rows_of(plain) != rows_of(other)


def test_every_epoch_has_every_row_in_another_order(cache):
    source = CacheSource(str(cache), (), split="train")
    count = len(source)
    batches = take(make_feed(source, global_batch_rows=4, seed=0), count)  # four epochs; batches cross their ends
    texts = [bytes(row) for batch in batches for row in batch["tokens"]]
    epochs = [texts[start : start + count] for start in range(0, 4 * count, count)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_split(cache):
    source = CacheSource(str(cache), (), split="eval")
    (batch,) = take(make_feed(source, global_batch_rows=11, seed=0), 1)
    assert batch["tokens"].shape == (11, 16)


def test_the_state_is_seed_and_step(cache):
    source = CacheSource(str(cache), split="train")
    with make_feed(source, global_batch_rows=3, seed=7) as feed:
        for _ in range(4):
            next(feed)
        state = feed.get_state()
        expected = [next(feed) for _ in range(3)]
        assert state == {"seed": 7, "next_step": 4}
        feed.set_state(state)
        found = [next(feed) for _ in range(3)]
        assert feed.get_state() == {"seed": 7, "next_step": 7}
        assert feed.wait_s > 0
    for one, two in zip(found, expected, strict=True):
        same(one, two)


def test_threads_end_with_the_feed(cache):
    source = CacheSource(str(cache), split="train")
    with make_feed(source, global_batch_rows=3, seed=0, prefetch_batches=4) as feed:
        next(feed)
        assert prefetchers()
    deadline = time.monotonic() + 5
    while prefetchers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetchers()


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def test_damage_in_a_thread_reaches_the_caller(cache, tmp_path):
    broken = shutil.copytree(cache, tmp_path / "cache")
    for path in broken.glob("segments/0000/taps/attn_out/c/*/0/0/0"):
        path.unlink()
    source = CacheSource(str(broken), split="train")
    with make_feed(source, global_batch_rows=2, seed=0) as feed, pytest.raises(DamageError, match="cannot be read"):
        next(feed)


def test_a_seed_beyond_32_bits_is_refused(cache):
    source = CacheSource(str(cache), (), split="train")
    with pytest.raises(ConfigError, match="seed"):
        make_feed(source, global_batch_rows=2, seed=2**32)
