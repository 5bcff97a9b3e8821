"""`distillcache show`: the right text, masks and figures of a row, in the terminal, as JSON and as a picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.schemas.format.layout import MANIFEST
from distillcache.tools.cli import main
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.feed.source import Batch
from tests.tools.look.planting import in_every_row, plant


def shown(cache: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert not main(["show", str(cache), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def of_source(cache: Path, row: int) -> Batch:
    return CacheSource(str(cache))[[row]]


def numbers(batch: Batch, tap: str) -> np.ndarray:
    """`[S, T, D]` of the batch's only row: bfloat16 is the upper half of float32."""
    return (batch[tap]["codes"][:, 0].astype(np.uint32) << 16).view(np.float32)


def test_text_masks_and_figures(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, batch = shown(cache, capsys, "--row", "17"), of_source(cache, 17)
    resid = numbers(batch, "resid")
    assert found["tokens"]["id"] == batch["tokens"][0].tolist()
    assert found["tokens"]["position"] == batch["positions"][0].tolist()
    assert found["tokens"]["document"] == batch["segment_ids"][0].tolist()
    assert "".join(found["tokens"]["text"]) == "".join(each["text"] for each in found["documents"])
    np.testing.assert_allclose(found["taps"]["resid"]["norm"], np.linalg.norm(resid, axis=-1), rtol=1e-4)
    unit = resid / np.linalg.norm(resid, axis=-1, keepdims=True)
    np.testing.assert_allclose(found["taps"]["resid"]["cosine_to_next"], (unit[1:] * unit[:-1]).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(found["taps"]["resid"]["largest_dimension"], np.abs(resid).argmax(-1))


def test_one_block(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(cache, capsys, "--row", "3", "--block", "1")
    assert [(each["tap"], each["slot"]) for each in found["slots"]] == [("resid", 1), ("resid", 2), ("attn_out", 1)]
    attn_out = numbers(of_source(cache, 3), "attn_out")
    np.testing.assert_allclose(found["taps"]["attn_out"]["norm"][0], np.linalg.norm(attn_out[1], axis=-1), rtol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--block", "1"]])
def test_the_figures_of_a_token_are_said_to_be_of_the_listed_slots(
    flags: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not main(["show", str(cache), *flags])
    printed = capsys.readouterr().out
    assert "over the slots listed above" in printed
    assert "all slots" not in printed


def test_a_picture(cache: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.svg", "b.svg", "a.png")]
    for picture in pictures:
        assert not main(["show", str(cache), "--row", "1", "--image", str(picture)])
    svg, again, png = (picture.read_bytes() for picture in pictures)
    assert svg == again
    assert b"resid: cosine to the next slot" in svg
    assert png.startswith(b"\x89PNG")


def test_what_a_person_reads(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not main(["show", str(cache), "--row", "37", "--tokens", "6"])
    printed = capsys.readouterr().out
    assert "document 1, tokens 0 to 3: ine<|end|>" in printed
    assert "padding" in printed
    assert "--start and --tokens show others" in printed

    def spoil(values: np.ndarray) -> np.ndarray:
        values[:, 1, 0, 5] = np.inf
        return values

    assert not main(["show", str(plant(cache, tmp_path / "c", in_every_row("attn_out", spoil)))])
    assert "1 not finite" in capsys.readouterr().out


def test_rows_keep_their_numbers_while_the_cache_is_built(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards 1 and 3 are committed: row 9 is there under its own number, row 0 is not."""
    planted = plant(cache, tmp_path / "full", lambda _, rows, values: (rows, values), tidy=False)
    shutil.copytree(planted, tmp_path / "c")
    for shard in (0, 2, 4):
        (tmp_path / f"c/segments/0000/receipts/{shard:05d}.json").unlink()
    assert not (tmp_path / "c" / MANIFEST).exists()
    assert shown(tmp_path / "c", capsys, "--row", "9")["tokens"] == shown(cache, capsys, "--row", "9")["tokens"]
    assert main(["show", str(tmp_path / "c"), "--row", "0"]) == 2
    assert "not committed yet" in capsys.readouterr().err


def test_what_is_not_there(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(cache), "--row", "99"]) == 2
    assert "0 to 37" in capsys.readouterr().err
    assert main(["show", str(cache), "--block", "9"]) == 2
    said = capsys.readouterr().err
    assert "lacks this block" in said
    assert "0 to 3" in said


@pytest.mark.parametrize("command", ["show", "inspect", "verify", "fidelity"])
def test_a_run_where_a_cache_is_wanted_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main([command, str(tmp_path)]) == 2
    assert "this is a run of `distillcache train`" in capsys.readouterr().err


def test_the_rest_of_a_row_with_a_damaged_tap(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = shutil.copytree(cache, tmp_path / "c")
    damaged = min((spoilt / "segments/0000/taps/attn_out/c").glob("0/*/*/*"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert main(["show", str(spoilt), "--json", "--row", "1"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert list(found["taps"]) == ["resid"]
    assert found["documents"] == shown(cache, capsys, "--row", "1")["documents"]
    assert str(damaged) in found["warnings"][0]
    assert "distillcache build --repair" in found["warnings"][0]
    assert main(["show", str(spoilt), "--row", "1", "--image", str(tmp_path / "row.svg")]) == 2
    assert "warning: a stored object is not what was committed" in capsys.readouterr().out
