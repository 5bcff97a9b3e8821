"""`distillcache`: one program with a command for each task.

Commands that report take `--json`: one JSON object on standard output, and nothing else there. Progress and logs go to
standard error. `--help` has the exit codes.
"""

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from distillcache.schemas.command_line import answer
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.runtime.standard_streams import drop, guard_standard_streams, replace_closed_streams

# command -> (module, function, what it does); imported when called, so that `--help` starts at once
COMMANDS = {
    "demo": ("tools.demo.command", "run", "runs the whole pipeline on a real teacher and writes a report"),
    "prepare": ("tools.commands.prepare", "run", "tokenises and packs text into rows"),
    "build": ("cache_builder.__main__", "build", "runs the teacher over rows and writes a cache; prepares text first"),
    "train": ("trainer.__main__", "train_command", "trains a student from a cache"),
    "export": ("tools.commands.export", "run", "writes a trained student as a Hugging Face directory"),
    "plan": ("tools.plan.command", "run", "estimates rows, bytes and time of a build before it writes anything"),
    "copy": ("tools.commands.copy", "run", "copies a cache to another path, codec, or choice of rows, blocks or taps"),
    "inspect": ("tools.look.inspect", "run", "describes a cache and warns about anomalies"),
    "serve": ("tools.viewer.command", "run", "shows a cache or a run live in the browser"),
    "report": ("tools.report.command", "run", "writes an HTML file about a cache or a run: tables, curves, heat maps"),
    "show": ("tools.look.show", "run", "shows one row: text, masks, per-token activation statistics by block"),
    "stats": ("tools.look.stats", "run", "computes rms, kurtosis, outlier dimensions and rank of a sample, by block"),
    "fidelity": ("tools.fidelity.command", "run", "compares the cache with its teacher and diagnoses mismatches"),
    "diff": ("tools.diff.command", "run", "lists the differences between two caches or two runs"),
    "export-samples": ("tools.look.export_samples", "run", "writes some rows with decoded taps as safetensors or npz"),
    "bench": ("tools.bench.command", "run", "measures speed against this machine's limits, and codec accuracy"),
    "verify": ("tools.look.verify", "run", "checks every byte of a cache against its committed digests"),
}

EXIT_CODES = {
    0: "done; verify, diff, fidelity: undamaged, the same, faithful",
    1: "a bug in the program, with a traceback",
    2: "one message: unusable input or a failure; verify, diff, fidelity: damage or a difference",
    3: "train, demo: the training diverged, or ended worse than it began; the message names the best checkpoint",
    143: "stopped by SIGTERM or SIGINT; the same command resumes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    replace_closed_streams()
    if argv is None:
        if sys.getfilesystemencoding() != "utf-8":
            _begin_again_in_utf8()
        guard_standard_streams()
    try:
        return answer(lambda: _flushed(list(sys.argv[1:] if argv is None else argv)))
    except BrokenPipeError:
        drop(sys.stdout.fileno())  # the reader (`| head`) has gone
    except SystemExit as stop:  # rich's answer to the same, with an exit code of 1
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
    return 0


def _flushed(words: list[str]) -> int:
    """Run one command line and flush standard output: what goes wrong there is noticed here."""
    code = _answer(words)
    sys.stdout.flush()
    return code


def _begin_again_in_utf8() -> None:
    """Replace this process by itself in Python's UTF-8 mode.

    Under `LC_ALL=C` without that mode, Python spells a path with an umlaut in half surrogate pairs, which no C++
    library takes. What the operating system hands over are the same bytes in both.
    """
    os.environ["PYTHONUTF8"] = "1"  # for the processes that we start
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _answer(words: list[str]) -> int:
    """Run one command line."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words == ["--version"]:
        print(f"distillcache {importlib.metadata.version('distillcache')}")
        return 0
    return answer(lambda: _run(words))


def _run(words: list[str]) -> int | None:
    """The exit code is the command's own, where it gives one."""
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? See distillcache --help" if close else "see distillcache --help"
        raise ConfigError("there is no such command", {"found": name, "expected": ", ".join(COMMANDS)}, hint)
    _refuse_lost_folder()
    module, function, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"distillcache.{module}"), function)
    return command([word for word in rest if word != "--json"], f"distillcache {name}", "--json" in rest)


def _refuse_lost_folder() -> None:
    """Raise where the working directory was deleted: no relative path can be used, not even to say where it leads."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory no longer exists", {}, "change to another directory (cd)") from None


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, (_, _, what) in COMMANDS.items()]
    usage = "usage: distillcache <command> [--config FILE.yaml] [--field value ...] [--json]"
    more = ["Every command explains its fields: distillcache build --help", "", "Exit codes:"]
    return "\n".join([usage, "", *lines, "", *more, *(f"  {code:>3}  {what}" for code, what in EXIT_CODES.items())])


if __name__ == "__main__":
    sys.exit(main())
