"""The demo's picture: the recovery between the teacher and the cut student."""

from pathlib import Path
from typing import Any

import pytest

from distillcache.tools.demo.report import write_chart

REPORT = {
    "perplexity": {"teacher": 25.0, "cut": 236.8, "recovered": 40.8},
    "curve": {"step": [0, 20, 40, 60], "perplexity": [236.8, 90.0, 50.0, 40.8]},
    "gap_closed": 0.925,
    "cosine_distance": {"block": [0, 1], "cut": [0.1, 0.2], "recovered": [0.01, 0.02]},
}


def lines(panel: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(map(float, line.get_ydata())) for line in panel.lines}


def test_perplexity_by_step_beside_the_blocks(tmp_path: Path, axes: list[Any]) -> None:
    write_chart(REPORT, tmp_path / "a.png")
    curve, blocks = axes
    assert lines(curve) == {
        "student": [236.8, 90.0, 50.0, 40.8],
        "student, cut: 236.8": [236.8, 236.8],
        "teacher: 25.0": [25.0, 25.0],
    }
    assert curve.get_title(loc="left") == "Held-out perplexity: 92.5% of the gap to the teacher closed"
    assert lines(blocks) == {"student, cut": [0.1, 0.2], "student, recovered": [0.01, 0.02]}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"perplexity": {"teacher": None, "cut": 236.8, "recovered": 40.8}, "gap_closed": None},
            ["student", "student, cut: 236.8"],
        ),
        ({"curve": {"step": [0], "perplexity": [236.8]}}, None),
        ({"curve": {"step": [0, 60], "perplexity": [None, None]}}, None),
    ],
    ids=["no teacher", "one evaluation", "undefined"],
)
def test_what_is_not_known_is_left_out(
    changes: dict[str, Any], names: list[str] | None, tmp_path: Path, axes: list[Any]
) -> None:
    write_chart({**REPORT, **changes}, tmp_path / "a.png")
    assert len(axes) == (1 if names is None else 2)
    if names is not None:
        assert list(lines(axes[0])) == names
        assert axes[0].get_title(loc="left") == "Held-out perplexity"
