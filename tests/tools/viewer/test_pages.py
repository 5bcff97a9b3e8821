"""The viewer's pages about a cache: the right numbers, and what is said of damage."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the viewer needs the extra `serve`")

from starlette.testclient import TestClient

from distillcache.schemas.format.rows import Row
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.figures import HeatMap
from distillcache.tools.viewer import row, search
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import byte_tokenizer
from tests.tools.look.planting import changed, in_every_row, plant, with_rows
from tests.tools.viewer.serving import client, numbers, read, viewer

__all__ = ["client"]  # a fixture


def test_the_overview_says_what_the_cache_is(client: TestClient, cache: Path) -> None:
    page = read(client, "/")
    assert "38 rows of 16 tokens, 3 blocks" in page.words
    assert page.tables["Bytes by tap"].row("attn_out")[:3] == ["bf16", "3", str(3 * 24 * 2)]
    assert {f"/slot/resid/{slot}" for slot in range(4)} <= set(page.addresses)
    assert str(cache) in page.words


def test_rows_are_listed_by_split_and_page(client: TestClient, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [index for index in range(38) if CacheSource(str(cache)).plan.rows.eval_indices.count(index)]
    evals = read(client, "/rows?split=eval").tables["The rows"]
    assert [int(cells[0]) for cells in evals.rows[1:]] == held_out
    monkeypatch.setattr("distillcache.tools.viewer.cache.ROWS_SHOWN", 10)
    seen, address = [], "/rows?split=train"
    while address:
        page = read(client, address)
        seen += [int(cells[0]) for cells in page.tables["The rows"].rows[1:]]
        onward = [each for each in page.addresses if each.startswith("/rows?split=train&start=")]
        address = next((each for each in onward if int(each.rpartition("=")[2]) == len(seen)), "")
    assert seen == [row for row in range(38) if row not in held_out]


def test_a_row_has_its_text_and_numbers(client: TestClient, cache: Path) -> None:
    page, batch = read(client, "/row/17"), CacheSource(str(cache))[[17]]
    assert byte_tokenizer().decode(batch["tokens"][0].tolist(), skip_special_tokens=False) in page.words
    norms = np.linalg.norm(numbers(cache, 17, "resid"), axis=-1)
    for token in (0, 9, 15):
        cells = page.tables["Tokens 0 to 15 of 16"].row(str(token))
        norm, slot = cells[4].split(" @")
        np.testing.assert_allclose(float(norm), norms[:, token].max(), rtol=1e-3)
        assert int(slot) == norms[:, token].argmax()
    median = float(page.tables["Slots of resid in this row"].row("2")[0])
    np.testing.assert_allclose(median, np.median(norms[2]), rtol=1e-3)
    assert {"/row/16", "/row/18", "/row/17/token/9"} <= set(page.addresses)


def test_one_tap_and_one_block_of_a_row(client: TestClient, cache: Path) -> None:
    page = read(client, "/row/3?tap=attn_out&block=1&start=8")
    assert "Slots of resid in this row" not in page.tables
    found = float(page.tables["Tokens 8 to 15 of 16"].row("9")[4])
    np.testing.assert_allclose(found, np.linalg.norm(numbers(cache, 3, "attn_out")[1, 9]), rtol=1e-3)


@pytest.mark.parametrize("address", ["/row/17", "/row/17?block=1"])
def test_the_figures_of_a_row_have_its_tokens_along_the_axis(address: str, client: TestClient, cache: Path) -> None:
    tokens = CacheSource(str(cache))[[17]]["tokens"][0].tolist()
    letters = [byte_tokenizer().decode([token], skip_special_tokens=False) for token in tokens]
    page = read(client, address)
    for drawing in page.source.split("<figure>")[1:]:
        words = re.findall(r"<text[^>]*>(\d+ [a-zA-Z])</text>", drawing.partition("</figure>")[0])
        assert words == [f"{at} {letter}" for at, letter in enumerate(letters) if letter.isalpha()] != []


def test_the_map_of_a_long_row_keeps_the_least_cosine(
    client: TestClient, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tokens share a column: it shows the one at which the stream turns."""
    drawn: list[HeatMap] = []
    monkeypatch.setattr(row, "COLUMNS", 4)
    monkeypatch.setattr(row, "draw_maps", lambda maps, _: drawn.extend(maps) or '<svg viewBox="0 0 1 1"></svg>')
    read(client, "/row/17?tap=resid")
    norms, cosine = drawn
    resid = numbers(cache, 17, "resid")
    unit = resid / np.linalg.norm(resid, axis=-1, keepdims=True)
    expected = (unit[1:] * unit[:-1]).sum(-1).reshape(3, 4, 4).min(axis=2)
    np.testing.assert_allclose(cosine.values, expected, atol=1e-4)
    np.testing.assert_allclose(norms.values, np.linalg.norm(resid, axis=-1).reshape(4, 4, 4).max(axis=2), rtol=1e-4)


def test_padding_and_documents_are_told(client: TestClient) -> None:
    page = read(client, "/row/37")
    assert "of the row are padding" in page.words
    assert any("padding" in cells for cells in page.tables["Tokens 0 to 15 of 16"].rows)


def test_a_token_across_blocks(client: TestClient, cache: Path) -> None:
    page, resid = read(client, "/row/17/token/9"), numbers(cache, 17, "resid")[:, 9]
    for slot in range(4):
        norm, cosine, nonfinite, largest = page.tables["This token in resid"].row(str(slot))
        np.testing.assert_allclose(float(norm), np.linalg.norm(resid[slot]), rtol=1e-3)
        assert nonfinite == "0"
        assert largest.startswith(f"{np.abs(resid[slot]).argmax()}: ")
        if slot < 3:
            lengths = np.linalg.norm(resid[slot]) * np.linalg.norm(resid[slot + 1])
            np.testing.assert_allclose(float(cosine), resid[slot] @ resid[slot + 1] / lengths, rtol=1e-3)


def test_a_slots_dimensions(client: TestClient, cache: Path) -> None:
    page, rows = read(client, "/slot/resid/2?rows=3&seed=5"), StoredRows(str(cache)).sample(3, 5)
    source = CacheSource(str(cache))[rows]
    real = source["segment_ids"] > 0
    values = (source["resid"]["codes"].astype(np.uint32) << 16).view(np.float32)[:, real]  # [S, t, D]
    rms = np.sqrt(np.square(values[2]).mean(0))
    dimension = int(rms.argmax())
    cells = [float(cell) for cell in page.tables["The 24 largest of 24 dimensions"].row(str(dimension))]
    np.testing.assert_allclose(cells[:2], [rms[dimension], rms[dimension] / np.median(rms)], rtol=1e-3)
    np.testing.assert_allclose(
        cells[2:4], [values[2, :, dimension].mean(), np.abs(values[2, :, dimension]).max()], rtol=1e-3
    )
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    (cosine,) = page.tables["Over the sample"].row("Cosine to slot 1")
    np.testing.assert_allclose(float(cosine), (unit[1] * unit[2]).sum(-1).mean(), atol=1e-4)
    assert {f"/row/{row}?block=2" for row in rows} <= set(page.addresses)
    # By number dimensions have no figure: neighbours have nothing in common.
    assert page.figures.keys() == {"Root mean square of the dimensions, largest first"}


def test_search_finds_text_and_ids(client: TestClient, cache: Path) -> None:
    tokens = CacheSource(str(cache))[range(38)]["tokens"]
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in tokens]
    page = read(client, "/search?text=LONGER+t")
    expected = [row for row, text in enumerate(texts) if "longer t" in text]
    found = [int(each.split("/")[2]) for each in page.addresses if "/token/" in each]
    assert found == expected[: search.HITS]
    letters = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens[expected[0]].tolist()]
    at = next(at for at in range(16) if "".join(letters[at:]).startswith("longer t"))
    assert f"/row/{expected[0]}/token/{at}" in page.addresses
    ids = tokens[5, 3:7].tolist()
    page = read(client, f"/search?ids={'+'.join(map(str, ids))}&start=5")
    assert "/row/5/token/" in next(each for each in page.addresses if "/token/" in each)
    assert "0 rows hold it" in read(client, "/search?text=%3Cscript%3E").words


def test_a_long_search_goes_on_where_it_stopped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_ROWS", 7)
    page = read(client, "/search?text=zzz&start=2")
    assert "/search?text=zzz&start=9" in page.addresses
    assert "continue from row 9" in page.words
    assert "continue" not in read(client, "/search?text=zzz&start=31").words


def test_damage_is_told_and_the_rest_is_shown(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(cache, folder)
    for name in ("taps/resid/c/0/0/0/0", "rows/00001.array_record"):
        file = folder / "segments/0000" / name
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
    client = viewer(folder)
    page = read(client, "/row/0")
    assert "resid: a stored object is not what was committed" in page.words
    assert "Slots of attn_out in this row" in page.tables
    assert "This token in attn_out" in read(client, "/row/0/token/1").tables
    page = read(client, "/row/9", 500)  # of the second shard
    assert "A file of rows is missing or damaged" in page.words
    assert page.tables["What is known"].row("Shard") == ["1"]
    assert read(client, "/rows").tables["The rows"].row("9")[0].startswith("damaged: ")
    assert "left out" in read(client, "/search?text=zzz").words
    assert "left out" in read(client, "/slot/resid/1?rows=5").words


def test_what_is_not_finite_is_counted(tmp_path: Path, cache: Path) -> None:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[:, 1, 2, :3] = (np.nan, np.inf, -np.inf)
        return values

    client = viewer(plant(cache, tmp_path / "nan", in_every_row("resid", change)))
    assert "not finite, in slots" in read(client, "/").words
    assert read(client, "/row/0").tables["Slots of resid in this row"].row("1")[3] == "3"
    assert read(client, "/row/0/token/2").tables["This token in resid"].row("1")[2] == "3"
    (said,) = read(client, "/slot/resid/1?rows=1").tables["Over the sample"].row("Not finite")
    assert said == "3"


def test_what_cannot_be_right_in_a_row_is_told(tmp_path: Path, cache: Path) -> None:
    def everything_is_text(row: Row) -> Row:
        real = np.ones_like(row.segment_ids)
        return changed(row, segment_ids=real, loss_mask=real > 0)

    assert "Impossible values" not in read(viewer(cache), "/row/37").words
    words = read(viewer(plant(cache, tmp_path / "text", with_rows(everything_is_text))), "/row/37").words
    assert "Impossible values" in words
    assert "and marked as text, in row 37" in words


def test_a_lost_tokenizer_is_told_and_ids_are_shown(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / "tokenizer.json").unlink()
    client, token = viewer(folder), int(CacheSource(str(cache))[[3]]["tokens"][0, 5])
    assert "a file of the cache is missing, so tokens are shown by their ids" in read(client, "/").words
    assert read(client, "/row/3").tables["Tokens 0 to 15 of 16"].row("5")[0] == f"{token} "
    assert "/row/3/token/" in str(read(client, f"/search?start=3&ids={token}").addresses)
