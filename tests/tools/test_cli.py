"""The command line as a whole."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillcache.tools.cli import main

ROOT = Path(__file__).parents[2]


def test_a_reader_who_has_gone_is_no_mistake() -> None:
    """`distillcache --help | head -1`."""
    command = [sys.executable, "-c", "from distillcache.tools.cli import main; raise SystemExit(main(['--help']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize(("word", "step"), [("bild", "did you mean build?"), ("xyzzy", "next      see distillcache")])
def test_an_unknown_command_is_answered_with_the_right_one(
    word: str, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert step in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "step"),
    [("r/checkpoints/20", "r --step 20"), ("r/checkpoints/best/", "r --best"), ("r", "name the folder")],
)
def test_an_export_of_a_checkpoint_names_the_run_and_the_flag(
    place: str, step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / place) + "/" * place.endswith("/"), str(tmp_path / "out")]) == 2
    assert step in capsys.readouterr().err


def test_a_reader_who_leaves_a_table_is_no_mistake(cache: Path) -> None:
    """`distillcache show CACHE | head -1`: rich answers a closed pipe with an exit code of its own."""
    program = f"from distillcache.tools.cli import main; raise SystemExit(main(['show', {str(cache)!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize(("command", "closed"), [("inspect", "<&- >&-"), ("inspect --help", "<&- >&- 2>&-")])
def test_closed_streams_are_no_mistake(command: str, closed: str, cache: Path) -> None:
    program = "import sys; from distillcache.tools.cli import main; raise SystemExit(main(sys.argv[1:]))"
    words = f"exec \"$@\" {command} '{cache}' {closed}"
    done = subprocess.run(["sh", "-c", words, "sh", sys.executable, "-c", program], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("command", ["--help", "inspect --help", "inspect CACHE", "inspect CACHE --json"])
def test_an_answer_that_cannot_be_written_is_one_message(command: str, cache: Path) -> None:
    """A table, JSON and help: the disk under `distillcache inspect CACHE > file` is full."""
    program = "import sys; from distillcache.tools.cli import main; raise SystemExit(main())"
    words = command.replace("CACHE", str(cache)).split()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program, *words], stdout=full, stderr=-1, cwd=ROOT, text=True)
    assert (done.returncode, done.stderr.splitlines()[:2]) == (
        2,
        ["error: standard output cannot be written", "  cause  No space left on device"],
    )
    assert len(done.stderr.splitlines()) == 3  # no traceback, and nothing that Python adds when it ends


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_terminal_lacks_is_escaped(encoding: str) -> None:
    program = r"""if True:
        from distillcache.tools import cli
        cli._answer = lambda words: print("h\u00e4 \u65e5 \ud800 end")
        raise SystemExit(cli.main())
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
    )
    expected = "h\u00e4 \u65e5 \ud800 end\n".encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


def test_a_working_directory_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", "cache"]) == 2
    assert "working directory no longer exists" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distillcache {importlib.metadata.version('distillcache')}\n"


@pytest.mark.parametrize("full", [False, True])
def test_a_build_goes_on_when_its_progress_cannot_be_written(
    full: bool, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    """Nobody reads it (`build 2>&1 | head -1` ended in the middle with exit code 0), or its disk is full."""
    if full and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device that is always full")
    words = ["--cache", str(tmp_path / "c"), "--teacher.path", str(teacher), "--data.path", str(corpus)]
    words += ["--data.row-tokens", "16", "--data.eval-rows", "4", "--batch-rows", "4", "--shard-rows", "8"]
    program = """if True:
        import sys
        from distillcache.tools import cli
        answer = cli._answer
        def talk(words):  # as a warning does
            print("one line", file=sys.stderr)
            return answer(words)
        cli._answer = talk
        raise SystemExit(cli.main())
    """
    errors = os.open("/dev/full", os.O_WRONLY) if full else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, "build", *words], stdout=-1, stderr=errors, cwd=ROOT
    ) as process:
        if process.stderr is None:
            os.close(errors)
        else:
            process.stderr.close()
        assert process.wait() == 0
    assert (tmp_path / "c" / "manifest.json").exists()
