"""A report's section about experts: which blocks are drawn, and on which scale."""

import re
from typing import Any

from distillcache.tools.report.experts import expert_fragments
from tests.tools.report.report_reading import ReadPage


def look(step: int, fullest: dict[int, float]) -> dict[str, Any]:
    """A line of loads of four experts; the first one's share by block."""
    share = [[first, *[(1 - first) / 3] * 3] for first in fullest.values()]
    return {"step": step, "blocks": list(fullest), "share": share}


def test_the_least_balanced_blocks_stand_on_one_scale() -> None:
    start = dict.fromkeys(range(5), 0.25)
    end = {0: 0.3, 1: 0.9, 2: 0.25, 3: 0.8, 4: 0.7}
    (_, drawn, _) = expert_fragments([], [look(1, start), look(1000, end)])
    page = ReadPage(drawn)
    alt = page.figures["Load of the experts over time in the least balanced blocks"]
    assert [int(block) for block in re.findall(r"block (\d+) from", alt)] == [1, 3, 4]
    assert "block 1 from 0.133 to 3.6" in alt
    figure = drawn.rpartition("<figure>")[2]
    assert figure.count("<image") == 3 + 1  # a map for each block, and one scale of colours
    assert ">1,000</text>" in figure  # the step of a look, which may lie apart from others'


def test_a_single_look_is_the_final_one() -> None:
    lines = [{"step": 1, "router/max_violation_block_00": 0.5}]
    (_, drawn, listed) = expert_fragments(lines, [look(1, {0: 0.25})])
    assert ReadPage(drawn).figures.keys() == {"Final load of the experts"}
    assert ReadPage(listed).tables["Load of the experts"].row("0") == ["1", "1", "1", "0"]
