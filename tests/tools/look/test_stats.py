"""`distillcache stats`: figures against NumPy's own, over rows read one by one."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.tools.cli import main
from distillcache.tools.look.stats import SlotStats
from distillcache.tools.look.stored_rows import StoredRows
from tests.tools.look.planting import in_every_row, plant


def stats(cache: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert not main(["stats", str(cache), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def test_figures_are_those_of_all_tokens_at_once(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stats(cache, capsys, "--rows", "5", "--out", str(tmp_path / "d.npz"))
    rows = StoredRows(str(cache))
    for entry in found["slots"]:
        tokens = np.concatenate(
            [
                dict(rows.slots(number, entry["tap"]))[entry["slot"]][rows.row(number).segment_ids > 0]
                for number in found["rows"]
            ]
        ).astype(np.float64)
        assert len(tokens) == found["tokens"]
        assert entry["rms"] == pytest.approx(np.sqrt(np.square(tokens).mean()))
        assert entry["kurtosis"] == pytest.approx(kurtosis(tokens))
        assert entry["abs_max"] == pytest.approx(np.abs(tokens).max())
        after = [
            dict(rows.slots(number, entry["tap"])).get(entry["slot"] + 1, np.zeros((0, 0))) for number in found["rows"]
        ]
        if after[0].size:
            real = [rows.row(number).segment_ids > 0 for number in found["rows"]]
            others = np.concatenate([values[mask] for values, mask in zip(after, real, strict=True)]).astype(np.float64)
            norms = np.linalg.norm(tokens, axis=1) * np.linalg.norm(others, axis=1)
            assert entry["cosine_to_next"] == pytest.approx(np.mean(np.sum(tokens * others, axis=1) / norms), abs=1e-6)
        else:
            assert entry["cosine_to_next"] is None
    with np.load(tmp_path / "d.npz") as arrays:
        assert arrays["resid.rms"].shape == (4, 24)
        np.testing.assert_allclose(arrays["attn_out.rms"][2], np.sqrt(np.square(tokens).mean(0)), rtol=1e-5)


def kurtosis(values: np.ndarray) -> float:
    return float((values**4).mean() / np.square(np.square(values).mean()))


def test_the_effective_rank_of_known_numbers() -> None:
    rng = np.random.default_rng(0)
    plain, flat = SlotStats(), SlotStats()
    plain.add(rng.normal(size=(4000, 8)).astype(np.float32), 4000)
    flat.add((rng.normal(size=(4000, 2)) @ rng.normal(size=(2, 8))).astype(np.float32), 4000)
    assert plain.effective_rank() == pytest.approx(8, abs=0.05)
    assert 1 < flat.effective_rank() < 2.01


def test_outliers_dead_dimensions_and_nans(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[:, 1, :, 7] *= 50
        values[:, 1, :, 3] = 0
        values[:, 2, 0, 0] = np.nan
        return values

    planted = plant(cache, tmp_path / "c", in_every_row("attn_out", spoil))
    found = stats(planted, capsys, "--taps", "[attn_out]", "--blocks", "[1, 2]", "--rows", "4")
    one, two = found["slots"]
    assert [at for at, _ in one["outlier_dimensions"]] == [7]
    assert one["dead_dimensions"] == 1
    assert two["nonfinite"] == 4
    assert not main(["stats", str(planted), "--rows", "2", "--out", str(tmp_path / "s.npz")])
    printed = capsys.readouterr().out
    assert "2 not finite" in printed
    assert f"written to {tmp_path / 's.npz'}" in printed


@pytest.mark.parametrize("size", [1e18, 1e24, 1e30])
def test_numbers_whose_squares_overflow(
    size: float, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every looking tool takes squares and products in float64: figures are those of the same numbers at their size."""
    planted = plant(cache, tmp_path / "c", in_every_row("resid", lambda values: values * np.float32(size)))
    plain, large = (stats(each, capsys, "--rows", "2", "--taps", "[resid]") for each in (cache, planted))
    for one, other in zip(plain["slots"], large["slots"], strict=True):
        assert other["rms"] == pytest.approx(one["rms"] * size, rel=1e-2)
        for name in ("kurtosis", "cosine_to_next", "effective_rank"):
            assert other[name] == (None if one[name] is None else pytest.approx(one[name], rel=2e-2))
    report = ["report", "--rows", "1", "--out", str(tmp_path / "r.html")]
    for command in (["show"], ["inspect"], ["diff", str(cache)], report):
        name, *rest = command
        main([name, str(planted), *rest, *([] if name == "report" else ["--json"])])
        told = capsys.readouterr()
        assert not re.search(r"\b(nan|inf|infinity)\b|RuntimeWarning", told.out + told.err, re.IGNORECASE), command
    assert not re.search(r">\s*-?(nan|inf)\b", (tmp_path / "r.html").read_text(), re.IGNORECASE)


def test_what_is_not_there(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(cache), "--taps", "[mlp_out]"]) == 2
    assert main(["stats", str(cache), "--blocks", "[9]"]) == 2
    assert "lacks these" in capsys.readouterr().err
