"""Python processes that this program starts, wherever the user stands.

`python -m` puts the working folder first on the path, so a `tools.py` or `random.py` that lies there would be imported
in place of ours or of Python's own. `-P` leaves it out; the child finds this program where its parent found it.
"""

import os
import sys
from pathlib import Path

import distillcache

ROOT = Path(distillcache.__file__).resolve().parent.parent  # the folder that this package is imported from


def python_words(*words: str) -> list[str]:
    """The command of a Python process that imports nothing from the working folder."""
    return [sys.executable, "-P", *words]


def python_environment() -> dict[str, str]:
    """This process's environment, with the place of this program on the path."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    known = [part for part in path if part and part != "."]
    # Installed packages are on every path, behind Python's own modules, and must stay there.
    own = [] if ROOT.name in ("site-packages", "dist-packages") else [str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*own, *known]))}
