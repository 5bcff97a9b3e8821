"""Figures of rows without a token: there are none, and nobody prints them as numbers or ends in a traceback."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.format.manifest import Stats, TapStats
from distillcache.schemas.store.store import Store
from distillcache.tools.diff.caches import compare_caches
from distillcache.tools.fidelity.command import check_fidelity
from distillcache.tools.look import inspect_warnings
from distillcache.tools.look.row_facts import read_row, summary
from distillcache.tools.look.stats import SlotStats
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.report.experts import expert_fragments


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are padding."""
    real = StoredRows.row

    def row(self: StoredRows, number: int):
        found = real(self, number)
        return replace(found, segment_ids=0 * found.segment_ids, loss_mask=found.loss_mask & False)

    monkeypatch.setattr(StoredRows, "row", row)


def test_sums_over_nothing_have_no_figures() -> None:
    stats = SlotStats()
    stats.add(np.zeros((0, 4), np.float32), 8)
    found = stats.describe()
    assert [found[name] for name in ("rms", "abs_max", "kurtosis", "effective_rank", "cosine_to_next")] == [None] * 5
    stats.add(np.zeros((3, 4), np.float32), 8)
    assert (stats.describe()["rms"], stats.describe()["kurtosis"]) == (0.0, None)  # zeros are numbers; 0/0 is none


@pytest.mark.usefixtures("emptied")
def test_rows_of_padding_are_told(cache: Path, teacher: Path) -> None:
    found = check_fidelity(StoredRows(str(cache)), str(teacher), 2, 0)
    assert found["verdict"]["kind"] == "padding-as-text"
    assert "there is no token to compare" in found["verdict"]["line"]
    assert found["taps"] == []
    compared = compare_caches(StoredRows(str(cache)), StoredRows(str(cache)), 2, 0)
    assert not compared["taps"]
    facts = read_row(StoredRows(str(cache)), 0)
    for tap in facts.taps:
        for entry in summary(tap, facts.real):
            assert set(entry["norm"].values()) == {None}
            assert entry["cosine_to_next"] is None


def test_statistics_of_nothing_are_not_dead_blocks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = open_cache(Store(str(cache)))[0]
    empty = {
        tap.name: TapStats(
            count=0,
            square_sum=(0.0,) * len(tap.slots),
            abs_max=(0.0,) * len(tap.slots),
            nonfinite=(0,) * len(tap.slots),
        )
        for tap in segment.plan.taps
    }
    for tap in segment.plan.taps:
        assert list(inspect_warnings._of_tap(tap, Stats(taps=empty).taps[tap.name])) == []


def test_experts_of_a_block_that_saw_no_token_have_dashes() -> None:
    loads = [{"step": 1, "blocks": [0, 1], "share": [[0.5, 0.5], [0.0, 0.0]]}]
    page = "".join(expert_fragments([], loads))
    assert page.count("–") >= 4  # noqa: RUF001 - the dash of tables
