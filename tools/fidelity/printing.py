"""Output of `distillcache fidelity`: the verdict, advice, and the slots worth seeing."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from distillcache.schemas.counted import counted
from distillcache.tools.fidelity.topk import words
from distillcache.tools.pages.terminal import table_console

LISTED = 8  # slots of a tap, where not all are requested: verdict and table fit on one screen


def print_fidelity(found: Mapping[str, Any], every_slot: bool) -> None:
    """The report of `fidelity.check_fidelity` on standard output."""
    console = table_console()
    color = "green" if found["verdict"]["kind"] == "faithful" else "red"
    for look in found["findings"]:
        console.print(f"[{color}]{escape(look['line'])}[/]")
    if color == "red":
        console.print(f"next: {escape(found['verdict']['next'])}")
    if not found["taps"] and found["topk_logits"] is None:
        return
    console.print(
        f"\n{counted(len(found['rows']), 'row')} of {found['cache']} against {found['teacher']}", markup=False
    )
    shown = found["taps"] if every_slot else _worth_seeing(found["taps"])
    if shown:
        console.print(_table(shown))
    if len(shown) < len(found["taps"]):
        console.print(f"{len(found['taps']) - len(shown)} other slots are no worse: --every-slot lists all")
    if found["topk_logits"] is not None:
        console.print(words(found["topk_logits"]))


def _worth_seeing(figures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Select of every tap the first and the last slot, then the wrong ones, then those with the largest error."""
    kept = []
    for tap in dict.fromkeys(each["tap"] for each in figures):
        of_tap = [each for each in figures if each["tap"] == tap]
        by_error = sorted(of_tap, key=lambda each: (-each["wrong_rows"], -each["weighted_error"]))
        chosen = [of_tap[0], of_tap[-1], *by_error][: LISTED + 2]
        slots = list(dict.fromkeys(each["slot"] for each in chosen))[:LISTED]
        kept += [each for each in of_tap if each["slot"] in slots]
    return kept


def _table(figures: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tap", "slot", "cosine distance", "error", "codec error", "worst", "in row", "token", "wrong rows"):
        table.add_column(column, justify="left" if column == "tap" else "right")
    for each in figures:
        worst = each["worst"]
        wrong = f"[red]{each['wrong_rows']}[/]" if each["wrong_rows"] else "0"
        cells = [f"{each[key]:.2g}" for key in ("cosine_distance", "error", "codec_error")]
        place = f"{worst['error']:.2g}", str(worst["row"]), str(worst["token"])
        table.add_row(each["tap"], str(each["slot"]), *cells, *place, wrong)
    return table
