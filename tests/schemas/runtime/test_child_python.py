"""Processes that we start import us and Python's own modules, whatever lies in the working folder."""

import os
import subprocess
import sys
from pathlib import Path

from distillcache.schemas.runtime.child_python import ROOT, python_environment, python_words


def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("tools.py", "schemas.py", "random.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the working folder')")
    words = python_words("-c", "import json, random, tools.cli, schemas; print(schemas.__file__)")
    done = subprocess.run(words, cwd=tmp_path, env=python_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(ROOT)


def test_a_path_with_an_umlaut_is_read_without_a_utf8_locale(tmp_path: Path) -> None:
    place = tmp_path / "käse"
    place.mkdir()
    environment = {**python_environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = "from distillcache.tools.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", program, "inspect", "--cache"]
    done = subprocess.run(
        [*map(os.fsencode, words), os.fsencode(place)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert "käse".encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"there is no cache here" in done.stderr
