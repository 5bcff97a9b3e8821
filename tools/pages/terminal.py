"""The console on which commands print their tables."""

import sys

from rich.console import Console

WIDTH = 140  # columns, where there is no terminal: rich would take those of an old one, and fold


def table_console(markup: bool = True) -> Console:
    """Standard output; long lines of text are left to the terminal. markup: whether `[red]` is a color."""
    return Console(highlight=False, soft_wrap=True, markup=markup, width=None if sys.stdout.isatty() else WIDTH)
