"""The warnings of `distillcache inspect`: from plans, receipts and indexes alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from schemas.manifest import Stats
from schemas.segment import open_cache
from schemas.storage import Store
from tests.tools.planting import Change, in_every_row, plant
from tools.cli import main
from tools.inspect_warnings import find_warnings


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
    "dead blocks, all but zero: [1]": in_every_row("attn_out", one_dead),
    "5 numbers are not finite, in slots [2]": in_every_row("resid", lambda v: one_nan(v)[: len(v)]),
    "shards [0, 3] hold the very same codes": lambda shard, rows, values: (
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


def test_a_shard_unlike_the_others_while_the_cache_is_built(cache: Path, tmp_path: Path) -> None:
    def louder(shard: int, rows: list, values: dict) -> tuple[list, dict]:
        return rows, {**values, "resid": values["resid"] * (4 if shard == 2 else 1)}

    found = warnings(plant(cache, tmp_path / "c", louder, tidy=False))
    assert len(found) == 1
    assert "resid: the rms of some shards is unlike the others': shard 2 (" in found[0]


def test_statistics_that_counted_padding(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.fidelity_rows import counted_padding

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
    assert "index is damaged" in found
