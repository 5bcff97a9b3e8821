"""The tables of `distillcache inspect`."""

import io

import pytest

from distillcache.tools.look import inspect_print
from distillcache.tools.look.inspect_print import _curves, _range


@pytest.mark.parametrize(("rms", "text"), [([0.5], "0.5"), ([0.61, 0.8, 0.3, 0.52], "0.3 to 0.8")])
def test_a_range_goes_from_the_least_to_the_largest_slot(rms: list[float], text: str) -> None:
    assert _range(rms) == text


@pytest.mark.parametrize(
    ("slots", "drawn", "words"),
    [
        (8, 8, "a character for each slot:"),
        (30, 30, "a character for each slot:"),
        (64, 64, "a character for each slot:"),
        (65, 33, "up to 2 neighbouring slots"),
        (129, 43, "up to 3 neighbouring slots"),
    ],
)
def test_a_curve_has_a_character_for_each_slot_or_says_how_many_share_one(
    slots: int, drawn: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_print.sys, "stdout", open_utf8())
    taps = [
        {"name": "attn_out", "segment": "0000", "rms": [1.0 + slot for slot in range(slots)]},
        {"name": "resid", "segment": "0000", "rms": [1.0, 2.0]},
        {"name": "resid", "segment": "0001-ab", "rms": [1.0, 2.0]},
        {"name": "topk_logits", "segment": "0000", "rms": [1.0]},
        {"name": "mlp_out", "segment": "0000", "rms": None},
    ]
    blank, head, first, *others = _curves(taps)
    assert (blank, words in head) == ("", True)
    name, curve = first.split()
    assert (name, len(curve), curve[0], curve[-1]) == ("attn_out", drawn, "▁", "█")
    assert [line.rpartition("  ")[0].strip() for line in others] == ["resid", "resid (0001)"]


def test_no_curve_where_a_terminal_cannot_draw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_print.sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert _curves([{"name": "resid", "segment": "0000", "rms": [1.0, 2.0]}]) == []


def open_utf8() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
