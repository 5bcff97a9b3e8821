"""Standard error while libraries that write there by themselves are called."""

import os
import tempfile

import pytest

from distillcache.schemas.runtime.library_log import without_library_log


def test_log_lines_of_libraries_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with without_library_log():
        os.write(2, b"E1129 10:11:02.133914   29508 google_auth_provider.cc:188] Could not find the credentials file\n")
        os.write(2, b"ours\nW1129 10:11:02.133914   29508 curl.cc:1] again\n")
    os.write(2, b"E1129 10:11:03.000001   29508 later\n")
    assert capfd.readouterr().err == "ours\nE1129 10:11:03.000001   29508 later\n"


@pytest.mark.parametrize("place", ["error", "temporary"])
def test_a_full_log_or_no_temporary_folder_stops_no_work(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "write") if place == "error" else (tempfile, "TemporaryFile")), refuse)
    done = []
    with without_library_log():
        done.append(place)
    assert done == [place]


class PanicException(BaseException):
    """Named as pyo3 names it."""


STACK = b"stack backtrace:\n   0: rust_begin_unwind\n             at ./a.c:3:4\n   1: _start\n"
HOW = b"note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n"


def _panic(end: bytes) -> None:
    os.write(2, b"ours\n\nthread '<unnamed>' (3) panicked at src/a.rs:1:2:\ntwo\n lines\n" + end + b"ours too\n")
    raise PanicException("two\n lines")


@pytest.mark.parametrize("end", [b"", HOW, STACK, STACK + HOW])
def test_what_rust_writes_about_a_panic_is_left_out(capfd: pytest.CaptureFixture[str], end: bytes) -> None:
    with pytest.raises(PanicException), without_library_log():
        _panic(end)
    assert capfd.readouterr().err == "ours\nours too\n"
