"""The picture of a row: one block as lines, all blocks as maps, its tokens' text along the axis."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np

from distillcache.tools.look import show_image
from distillcache.tools.look.row_facts import RowFacts, TapFacts, read_row, token_labels
from distillcache.tools.look.show_image import COLUMNS, draw
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.trainer.feed.cache_source import CacheSource

SVG = "{http://www.w3.org/2000/svg}"


def numbers(cache: Path, row: int, tap: str) -> np.ndarray:
    """`[S, T, D]`, by the feed: bfloat16 is the upper half of float32."""
    return (CacheSource(str(cache))[[row]][tap]["codes"][:, 0].astype(np.uint32) << 16).view(np.float32)


def facts_of(values: np.ndarray, cosine: np.ndarray, texts: list[str] | None = None) -> RowFacts:
    """A row of one document whose stream has these norms, `[S, T]`, and no more."""
    count = values.shape[1]
    ones = np.ones(count, np.int32)
    row = SimpleNamespace(segment_ids=ones, loss_mask=ones > 0, split="train", tokens=ones)
    tap = TapFacts("resid", tuple(range(len(values))), values, cosine, ones, values, (), np.zeros(len(values)))
    labels = tuple(texts or ["a"] * count)
    return RowFacts(3, ("0000", 0), row, labels, ((1, 0, count),), (tap,))  # type: ignore[arg-type]


def test_one_block_is_drawn_as_lines(cache: Path, tmp_path: Path, axes: list[Any]) -> None:
    draw(read_row(StoredRows(str(cache)), 1, 1), str(tmp_path / "a.svg"), 1)
    assert [len(panel.images) for panel in axes] == [0, 0, 0]
    _, norms, alike = axes
    resid, attn_out = numbers(cache, 1, "resid"), numbers(cache, 1, "attn_out")
    expected = {"resid 1": resid[1], "resid 2": resid[2], "attn_out 1": attn_out[1]}
    drawn = {line.get_label(): line.get_ydata() for line in norms.lines}
    assert drawn.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(drawn[name], np.linalg.norm(values, axis=-1), rtol=1e-4)
    unit = resid / np.linalg.norm(resid, axis=-1, keepdims=True)
    np.testing.assert_allclose(alike.lines[0].get_ydata(), (unit[1] * unit[2]).sum(-1), atol=1e-4)
    words = {each.text for each in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")}
    assert any("row 1, block 1" in (each or "") for each in words)


def test_padding_is_left_out_of_the_lines(cache: Path, tmp_path: Path, axes: list[Any]) -> None:
    facts = read_row(StoredRows(str(cache)), 37, 1)
    draw(facts, str(tmp_path / "a.svg"), 1)
    assert not facts.real.all()
    for line in axes[1].lines:
        np.testing.assert_array_equal(np.isfinite(line.get_ydata()), facts.real)


def test_all_blocks_are_maps(cache: Path, tmp_path: Path, axes: list[Any]) -> None:
    draw(read_row(StoredRows(str(cache)), 1), str(tmp_path / "a.png"))
    maps = {panel.get_title(loc="left"): panel.images for panel in axes if panel.images}
    assert list(maps) == [
        "resid: norm of the token's vector",
        "resid: cosine to the next slot",
        "attn_out: norm of the token's vector",
    ]
    norms = np.linalg.norm(numbers(cache, 1, "resid"), axis=-1)
    np.testing.assert_allclose(maps["resid: norm of the token's vector"][0].get_array(), norms, rtol=1e-4)


def test_a_long_row_keeps_its_largest_norm_and_its_least_cosine(tmp_path: Path, axes: list[Any]) -> None:
    count = 3 * COLUMNS + 1
    norms, cosine = np.ones((4, count)), np.ones((3, count))
    norms[2, 1234], cosine[1, 777] = 5000, -0.5
    draw(facts_of(norms, cosine), str(tmp_path / "a.png"))
    largest, least = (panel.images[0] for panel in axes if panel.images)
    assert largest.get_array().shape[1] <= COLUMNS
    assert largest.get_array().max() == 5000
    assert least.get_array().min() == -0.5
    left, right, *_ = largest.get_extent()
    column = int(largest.get_array()[2].argmax())
    width = (right - left) / largest.get_array().shape[1]
    assert left + width * column <= 1234 <= left + width * (column + 1)


def test_text_of_any_kind_is_a_valid_picture(tmp_path: Path) -> None:
    texts = ["$x$", "\x00", "\x1b[0m", " the", "\n", "", "语言", "<b>&", "🦊", "\ufffd", "a very long word indeed"]
    norms = np.ones((2, len(texts)))
    draw(facts_of(norms, np.ones((1, len(texts))), texts), str(tmp_path / "a.svg"), 0)
    words = {each.text for each in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}text")}
    assert {"0 $x$", r"1 \x00", "3 the", "6 语言", "7 <b>&", "8 🦊", "10 a very long"} <= words


def test_labels_show_what_is_invisible_and_leave_padding_out() -> None:
    texts = ["\x00", " fox", " ", "\n\n", "", "a\tb", "x" * 40, "pad"]
    found = token_labels(texts, [True] * 7 + [False])
    assert found == [r"0 \x00", "1 fox", "2 ' '", r"3 '\n\n'", "4 ''", r"5 a\tb", f"6 {'x' * 12}", ""]


def test_a_long_row_has_as_many_labels_as_fit(tmp_path: Path, axes: list[Any]) -> None:
    norms = np.ones((2, 1024))
    draw(facts_of(norms, np.ones((1, 1024))), str(tmp_path / "a.svg"), 0)
    labels = [text.get_text() for text in axes[-1].get_xticklabels()]
    assert 40 < len(labels) <= show_image.LABELLED_TOKENS
    assert labels[:2] == ["0 a", "12 a"]
