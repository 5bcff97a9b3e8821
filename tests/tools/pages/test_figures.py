"""Figures: one scale of colours for several maps, labels that fit, axes that show what they are asked for."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure as Canvas

from distillcache.tools.pages.figures import LABELS, HeatMap, Line, _round_ticks, draw_lines, draw_maps, limits_of
from distillcache.tools.pages.pictures import label_places


def pixels(svg: str) -> list[np.ndarray]:
    """The pictures in a drawing, `[rows, columns, 4]` each."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    return [image.imread(io.BytesIO(base64.b64decode(data))) for data in found]


def words(svg: str) -> list[str]:
    """The words in a drawing, in their order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def map_of(*values: float, log: bool = False, **changes: object) -> HeatMap:
    return HeatMap(np.asarray([values], float), "a", "x", "y", "unit", log=log, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("log", [False, True])
def test_on_one_scale_equal_values_have_equal_colours(log: bool) -> None:
    maps = [map_of(1, 2, log=log), map_of(2, 4, log=log)]
    low, high, *bars = pixels(draw_maps(maps, limits=limits_of(maps)))
    np.testing.assert_array_equal(low[0, -1], high[0, 0])
    assert (low[0, 0] != high[0, -1]).any()
    assert len(bars) == 1
    apart = pixels(draw_maps(maps))
    np.testing.assert_array_equal(apart[0][0, -1], apart[1][0, -1])  # the largest of each
    assert len(apart) == 4


def test_limits_are_those_of_what_is_shown() -> None:
    assert limits_of([map_of(0, np.nan, 3), map_of(-1, np.inf)]) == (-1, 3)
    assert limits_of([map_of(0, 2, 3, log=True)]) == (2, 3)  # a logarithm of nothing is blank
    assert limits_of([map_of(np.nan)]) is None
    draw_maps([map_of(np.nan, np.nan), map_of(5.0, 5.0, log=True), map_of(0.0, log=True)])


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (LABELS, LABELS), (LABELS + 1, 13), (1024, 24)])
def test_as_many_labels_as_fit(count: int, shown: int) -> None:
    panel = Canvas().subplots()
    label_places(panel, [f"{at} word" for at in range(count)], LABELS, 7)
    places = panel.get_xticks().astype(int).tolist()
    assert len(places) == shown
    assert {*np.diff(places)} <= {-(-count // LABELS)}
    assert [text.get_text() for text in panel.get_xticklabels()] == [f"{at} word" for at in places]


def test_a_label_is_no_formula() -> None:
    svg = draw_lines([Line("a", np.arange(2.0), np.ones(2))], "x", "y", x_labels=["0 $x$", r"1 \frac$"])
    assert {"0 $x$", r"1 \frac$"} <= set(words(svg))


def test_words_of_other_scripts_are_drawn_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    svg = draw_lines([Line("a", np.arange(2.0), np.ones(2))], "x", "y", x_labels=["0 语言", "1 한국"])
    assert {"0 语言", "1 한국"} <= set(words(svg))
    assert [str(each.message) for each in recwarn if "Glyph" in str(each.message)] == []


def test_a_share_has_an_axis_in_percent() -> None:
    share = [Line("a", np.arange(3.0), np.asarray([0.5, 0.6, 0.7]))]
    found = words(draw_lines(share, "x", "y", percent=True, covers=[0, 1]))
    assert {"0%", "100%"} <= set(found)
    assert not {"0%", "100%"} & set(words(draw_lines(share, "x", "y", percent=True)))
    wide = [Line("a", np.arange(2.0), np.asarray([0.001, 1.0]))]
    assert "100%" in words(draw_lines(wide, "x", "y", percent=True))  # never by the logarithm


def test_a_share_that_fell_far_leaves_the_picture_and_the_others_stay_readable() -> None:
    share = [Line("a", np.arange(3.0), np.asarray([0.0, 0.9, -2661.0]))]
    found = words(draw_lines(share, "x", "y", percent=True, covers=[0, 1], lowest=-1.0))
    ticks = [float(word.replace("\N{MINUS SIGN}", "-").rstrip("%")) for word in found if word.endswith("%")]
    assert min(ticks) == -100
    assert {0.0, 100.0} <= set(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2.1, 23986, [10, 100, 1000, 10000]),
        (1.6, 6.7, [2, 5]),
        (2.2, 4.1, [2.2, 4.1]),
        (0.0091, 1.9, [0.01, 0.1, 1]),
        (1, 1, [1, 1]),
        (1e-9, 1e9, [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
    ],
)
def test_a_scale_of_colours_has_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    np.testing.assert_allclose(_round_ticks(low, high), ticks)


def test_ticks_of_a_logarithmic_axis_do_not_crowd() -> None:
    for high in (100, 1e6, 1e30):
        line = Line("a", np.arange(3.0), np.asarray([20.0, 30.0, high]))
        svg = draw_lines([line, Line("b", np.arange(3.0), np.ones(3))], "x", "y", whole=True)
        ticks = [word for word in words(svg) if re.fullmatch(r"[\d.]+(e[+-]\d+)?", word)]
        assert 3 + 3 <= len(ticks) <= 3 + 9  # three are of the x axis


def places_of_names(names: list[str]) -> list[tuple[float, float]]:
    """Where a chart writes the names of its lines."""
    svg = draw_lines([Line(name, np.arange(2.0), np.ones(2)) for name in names], "x", "y")
    found = []
    for name in names:
        (tag,) = re.findall(rf"<text([^>]*)>{re.escape(name)}</text>", svg)
        where = re.search(r"translate\(([\d.]+) ([\d.]+)\)", tag) or re.search(r'x="([\d.]+)" y="([\d.]+)"', tag)
        assert where is not None
        found.append((float(where[1]), float(where[2])))
    return found


def test_long_names_are_listed_one_below_the_other() -> None:
    (short, beside), (long, below) = (
        places_of_names(["resid", "attn_out"]),
        places_of_names(["resid (0001-1cf04207090f52da)", "attn_out (0001-1cf04207090f52da)"]),
    )
    assert short[1] == beside[1]
    assert long[0] == below[0]
    assert long[1] < below[1]
