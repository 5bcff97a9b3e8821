"""Training hours of several students: by hand, in the plot, and as README and docs print them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.tools import cli
from distillcache.tools.plan.scale import CHOICES, describe_scale
from distillcache.tools.plan.scale_report import scaled
from distillcache.tools.plan.students import ONLINE, add_hours, figures, plotted

ROOT = Path(__file__).parents[3]


def simulated(**changes: Any) -> dict[str, Any]:
    config = SimulateConfig(tokens=[1e9], **changes)
    return add_hours(config, describe_scale(config))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return simulated()


def hours(report: dict[str, Any], choice: str, teacher: str = "llama-3.1-8b") -> dict[str, list[float]]:
    (found,) = (c["students"] for c in report["caches"] if (c["teacher"], c["choice"]) == (teacher, choice))
    return found


def test_hours_by_hand(report: dict[str, Any]) -> None:
    """One host: the student's FLOPs bound int8, reading the cache bounds bf16."""
    teacher_s = 1e9 / 51_619.87  # tokens over tokens/s of the host
    student_s = 3 * 0.25 * teacher_s
    read_s = 532_480e9 / 25e9
    int8, bf16 = hours(report, "attn_out, resid: int8"), hours(report, "attn_out, resid: bf16")
    assert int8["online_h"] == pytest.approx([n * (teacher_s + student_s) / 3600 for n in (1, 2, 4, 8, 16)], rel=1e-4)
    each = [(later - first) * 3600 for first, later in zip(int8["cached_h"], int8["cached_h"][1:], strict=False)]
    assert each == pytest.approx([n * student_s for n in (1, 2, 4, 8)], rel=1e-4)
    assert (bf16["cached_h"][1] - bf16["cached_h"][0]) * 3600 == pytest.approx(read_s, rel=1e-3)
    assert int8["cached_h"][0] * 3600 - student_s == pytest.approx(teacher_s, rel=0.06)  # start, preemptions, retries


def test_a_bucket_bounds_many_hosts() -> None:
    """With 16 hosts the teacher is faster than reading all int8 taps at the bucket's 25 GB/s."""
    found = hours(simulated(students={"hosts": 16}), "attn_out, resid: int8")
    assert found["cached_h"][-1] > 4 * found["online_h"][-1]


def test_the_plot_in_docs_has_the_figures_of_plan(report: dict[str, Any]) -> None:
    svg = (ROOT / "docs/images/hours.svg").read_text()
    described = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    assert described
    assert json.loads(described[1].replace("&quot;", '"')) == figures(report)


def test_a_plot_is_made_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--simulate", "--tokens", "[1e9]", "--teachers", "[llama-3.1-8b]", "--plot"]
    for name in ("a/hours.svg", "b/hours.svg"):
        assert cli.main([*words, str(tmp_path / name)]) == 0
    assert "16, teacher in the loop" in capsys.readouterr().out
    assert (tmp_path / "a/hours.svg").read_bytes() == (tmp_path / "b/hours.svg").read_bytes()


def rows_of_table(page: str, header: str) -> list[list[str]]:
    """The cells of the Markdown table that begins with this header."""
    lines = (ROOT / page).read_text().split(header)[1].splitlines()[2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_readme_states_the_bytes_of_plan(report: dict[str, Any]) -> None:
    names = {"Llama 3.1 8B": "llama-3.1-8b", "Llama 3.1 70B": "llama-3.1-70b"}
    rows = rows_of_table("README.md", "| teacher | recorded |")
    assert len(rows) == 2 * len(CHOICES)
    for teacher, choice, each, total in rows:
        (cache,) = (c for c in report["caches"] if (c["teacher"], c["choice"]) == (names[teacher], choice))
        assert (each, total) == (f"{cache['bytes_per_token']:,}", scaled(cache["bytes"], "B"))


def test_the_readme_states_the_hours_of_plan(report: dict[str, Any]) -> None:
    found, counts = figures(report), [1, 2, 4, 8, 16]
    rows = rows_of_table("README.md", "| students |")
    assert len(rows) == 3
    lines = (found[ONLINE], found["attn_out, resid: int8"], found["attn_out, resid: bf16"])
    for count, *cells in rows:
        at = counts.index(int(count))
        assert cells == [f"{line[at]:.1f} h" for line in lines]
    assert set(plotted(report["caches"])) | {ONLINE} == set(found)


def test_the_page_on_scale_prints_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the tables of 1B tokens in docs/scale.md, but for the spaces between columns."""
    assert cli.main(["plan", "--simulate", "--tokens", "[1e9]"]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    page = [" ".join(line.split()) for line in (ROOT / "docs/scale.md").read_text().splitlines()]
    missing = [line for line in printed if line and line not in page]
    assert not missing


def test_a_plot_may_have_nothing_but_a_suffix(tmp_path: Path) -> None:
    words = ["plan", "--simulate", "--tokens", "[1e9]", "--teachers", "[llama-3.1-8b]", "--plot"]
    assert cli.main([*words, str(tmp_path / ".svg")]) == 0
    assert (tmp_path / ".svg").read_bytes().startswith(b"<?xml")
