"""`distillcache export-samples`: rows and taps that other programs read."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from distillcache.tools.cli import main
from distillcache.tools.look.stored_rows import StoredRows


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_file_holds_what_the_cache_decodes_to(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / f"x.{kind}"
    assert not main(["export-samples", str(cache), str(out), "--rows", "[9, 4]", "--blocks", "[1]", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == [9, 4]
    arrays = dict(np.load(out)) if kind == "npz" else safetensors.numpy.load_file(out)
    rows = StoredRows(str(cache))
    assert arrays["resid.slots"].tolist() == [1, 2]
    assert arrays["attn_out"].shape == (1, 2, 16, 24)
    for place, number in enumerate((9, 4)):
        np.testing.assert_array_equal(arrays["tokens"][place], rows.row(number).tokens)
        for at, slot in enumerate((1, 2)):
            np.testing.assert_array_equal(arrays["resid"][at, place], dict(rows.slots(number, "resid"))[slot])


def test_drawn_rows_are_the_same_again(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert not main(["export-samples", str(cache), str(tmp_path / f"{name}.safetensors"), "--count", "3"])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_cannot_be_written(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-samples", str(cache), str(tmp_path / "x.pickle")]) == 2
    assert main(["export-samples", str(cache), str(tmp_path / "x.npz"), "--blocks", "[9]"]) == 2
    assert main(["export-samples", str(cache), str(tmp_path / "x.npz"), "--rows", "[99]"]) == 2
    assert "no such row" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
