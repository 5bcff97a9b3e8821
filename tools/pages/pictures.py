"""Picture files: their axes, and the metadata by which a command knows its own again."""

from pathlib import Path
from typing import Any

from distillcache.schemas.store.whole_file import make_folder_of, writing

MADE_BY = "distillcache"
# By suffix, as matplotlib wants them; no dates: the same numbers are the same file.
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": MADE_BY}, "png": {"Software": MADE_BY}}
# What the metadata looks like in a file, of either kind: the name alone is also in pictures of others, as a title.
MARKS = (f"<dc:title>{MADE_BY}</dc:title>".encode(), b"Software\x00" + MADE_BY.encode())


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure of Matplotlib's as .svg or .png, by the path; the same numbers give the same file."""
    from matplotlib import rc_context

    kind = path.name.rpartition(".")[2] if "." in path.name else ""
    with rc_context({"svg.hashsalt": path.name}):
        make_folder_of(path)
        with writing(path, says=True) as file:
            figure.savefig(file, dpi=110, format=kind or None, metadata=METADATA.get(kind))


def scale_by_ratios(panel: Any) -> None:
    """Give a panel of Matplotlib's a logarithmic vertical axis, with labels at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
