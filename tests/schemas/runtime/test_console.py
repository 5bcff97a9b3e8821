"""The log: silent in a library, plain lines on standard error of a command."""

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from distillcache.schemas.runtime.console import last_words, shown_log, terminal

ROOT = Path(__file__).parents[3]
LIBRARY = ("schemas", "models", "cache_builder", "trainer")
COMMAND_LINE = {ROOT / "schemas" / "command_line.py", *(ROOT / folder / "__main__.py" for folder in LIBRARY)}
log = logging.getLogger("distillcache.here")


@pytest.mark.parametrize("folder", LIBRARY)
def test_library_code_prints_nothing(folder: str) -> None:
    """Also no printing of a traceback, and no handler or level that a program has not asked for."""
    refused = {"print", "print_exc", "print_exception", "basicConfig", "setLevel", "addHandler"}
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file in COMMAND_LINE or file.name == "console.py":
            continue
        calls = [node.func for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
        names = {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in calls}
        found += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(names & refused)]
    assert found == []


def test_a_command_shows_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.warning("before")
    with shown_log(), shown_log():  # one command may run another
        log.info("a fact")
        log.warning("100% odd")
        log.critical("error: it ends\n  cause  this")
        log.debug("not shown")
    log.warning("after")
    assert capsys.readouterr() == ("", "a fact\nwarning: 100% odd\nerror: it ends\n  cause  this\n")


def test_a_program_without_logging_sees_nothing_but_what_ends_it() -> None:
    code = (
        "import logging, distillcache\n"
        "from distillcache.schemas.runtime.console import last_words\n"
        "logging.getLogger('distillcache.here').warning('odd')\n"
        "last_words('it ends')\n"
        "logging.basicConfig(format='%(name)s %(message)s')\n"
        "logging.getLogger('distillcache.here').warning('odd')\n"
        "last_words('it ends')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "it ends\ndistillcache.here odd\ndistillcache it ends\n")


def test_what_ends_a_command_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_log():
        last_words("it ends")
    assert capsys.readouterr().err == "it ends\n"


def test_a_bar_is_drawn_on_the_terminal_that_shows_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with shown_log():
        assert terminal() is None
        monkeypatch.setattr(stream, "isatty", lambda: True)
        assert terminal() is stream
    assert terminal() is None
