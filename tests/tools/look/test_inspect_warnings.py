"""The warnings of `distillcache inspect`: from plans, receipts and indexes alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder.record.finish import finish_segment
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.manifest import Stats
from distillcache.schemas.format.times import ShardSeconds, summed_up
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.inspect_warnings import _slow, find_warnings
from distillcache.tools.look.segment_facts import sampled_receipts
from tests.tools.look.planting import Change, in_every_row, plant


def warnings(cache: Path) -> list[str]:
    for taps in cache.glob("segments/*/taps/*/c"):
        shutil.rmtree(taps)  # not a byte of them is needed
    return find_warnings(open_cache(Store(str(cache)), partial=True))


def test_a_whole_cache_has_none(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings(shutil.copytree(cache, tmp_path / "c")) == []
    assert not main(["inspect", str(cache), "--json"])
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def one_dead(values: np.ndarray) -> np.ndarray:
    values[:, 1] = 0
    return values


def one_nan(values: np.ndarray) -> np.ndarray:
    values[:, 2, 0, 0] = np.nan
    return values


CASES: dict[str, Change] = {
    "dead blocks, almost zero: [1]": in_every_row("attn_out", one_dead),
    "5 numbers not finite, in slots [2]": in_every_row("resid", lambda v: one_nan(v)[: len(v)]),
    "shards [0, 3] hold identical codes": lambda shard, rows, values: (
        rows,
        {tap: np.full_like(each, 0.5) if shard in (0, 3) else each for tap, each in values.items()},
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_faults_are_named(cache: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    planted = plant(cache, tmp_path / "c", CASES[words])
    expected = words.replace("5 numbers", "38 numbers")
    assert any(expected in warning for warning in warnings(planted)), warnings(planted)
    assert not main(["inspect", str(planted)])
    assert "warning:" in capsys.readouterr().out


def test_a_block_that_is_all_nan_is_not_called_dead(cache: Path, tmp_path: Path) -> None:
    def all_nan(values: np.ndarray) -> np.ndarray:
        values[:, 1] = np.nan
        return values

    (found,) = warnings(plant(cache, tmp_path / "c", in_every_row("attn_out", all_nan)))
    assert "not finite, in slots [1]" in found


def test_a_shard_unlike_the_others_while_the_cache_is_built(cache: Path, tmp_path: Path) -> None:
    def louder(shard: int, rows: list, values: dict) -> tuple[list, dict]:
        return rows, {**values, "resid": values["resid"] * (4 if shard == 2 else 1)}

    found = warnings(plant(cache, tmp_path / "c", louder, tidy=False))
    assert len(found) == 1
    assert "resid: the rms of some shards differs from the others': shard 2 (" in found[0]


def test_statistics_that_counted_padding(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distillcache.tools.fidelity.rows import counted_padding

    segment = open_cache(Store(str(cache)))[0]
    data = json.loads((cache / "segments/0000/stats.json").read_text())
    stats = Stats.model_validate({"taps": data["taps"]})
    assert counted_padding(segment.plan, stats) == ""
    more = stats.taps["resid"].model_copy(update={"count": 38 * 16 * 24})
    words = counted_padding(segment.plan, Stats(taps={**stats.taps, "resid": more}))
    assert words == f"the statistics of resid count 608 tokens, the rows hold {segment.plan.rows.tokens}"


def test_a_damaged_index_is_a_warning(cache: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(cache, tmp_path / "c")
    index = copied / "segments/0000/index.bin"
    index.write_bytes(index.read_bytes()[:-3])
    (found,) = warnings(copied)
    assert "the index of a segment is missing or truncated" in found


def timed(store: Store, seconds: dict[int, tuple[float, str]]) -> None:
    """Other times in the receipts of an unfinished cache."""
    (segment,) = open_cache(store, partial=True)
    for receipt in sampled_receipts(segment):
        compute, host = seconds[receipt.shard]
        noted = ShardSeconds(compute=compute, write=0.5, total=compute + 0.5, host=host)
        store.write(
            layout.receipt_key("0000", receipt.shard), to_canonical(receipt.model_copy(update={"seconds": noted}))
        )


@pytest.mark.parametrize("finished", [False, True])
def test_shards_and_machines_that_are_slow(
    cache: Path, tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the cache is built, and from what is kept of the receipts afterwards."""
    copied = plant(cache, tmp_path / "c", lambda _, rows, values: (rows, values), tidy=False)
    store = Store(str(copied))
    timed(store, {0: (3.0, "a"), 1: (3.1, "a"), 2: (9.0, "b"), 3: (2.9, "a"), 4: (1.0, "a")})
    if finished:
        finish_segment(store, open_cache(store, partial=True)[0].plan)
    (found,) = warnings(copied)
    assert found == "shards that took much longer to compute than the median of 3 s: shard 2 9 s on b"
    assert not main(["inspect", str(copied), "--json"])
    seconds = json.loads(capsys.readouterr().out)["segments"][0]["seconds"]
    assert (seconds["shards"], seconds["compute"]["median"], seconds["hosts"]["a"]["shards"]) == (5, 3.0, 4)
    assert not main(["inspect", str(copied)])
    said = capsys.readouterr().out
    assert "a shard took 3 s (1 to 9) to compute and 0.5 s (0.5 to 0.5) to write, on 2 machines" in said


def test_a_slow_machine() -> None:
    seconds = {
        shard: ShardSeconds(compute=4.0 if shard < 4 else 1.0, write=0.1, total=5, host="ab"[shard >= 4])
        for shard in range(10)
    }
    words = list(_slow(summed_up(seconds)))
    assert words[-1] == "a took 4 s a shard to compute, other machines 1 s"


def test_a_cache_without_times(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As earlier versions left them."""
    copied = shutil.copytree(cache, tmp_path / "c")
    (copied / "segments/0000/times.json").unlink()
    assert warnings(copied) == []
    assert not main(["inspect", str(copied)])
    assert "to compute" not in capsys.readouterr().out


def test_damaged_statistics_do_not_end_it(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(cache, tmp_path / "c")
    (copied / "segments/0000/stats.json").write_bytes(b"{}")
    assert not main(["inspect", str(copied)])
    assert "stats.json): run `distillcache verify`" in capsys.readouterr().out
