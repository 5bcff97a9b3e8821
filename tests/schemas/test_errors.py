"""Messages of errors: what the system says is said once, in its words."""

from pathlib import Path

import pytest

from distillcache.schemas.command_line import load_yaml
from distillcache.schemas.errors import ConfigError, DistillcacheError, StorageError


def test_a_path_is_named_once(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError) as caught:
        load_yaml(str(missing))
    assert str(caught.value).count(str(missing)) == 1
    assert "cause  No such file or directory\n" in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "No such file or directory"),
        (FileNotFoundError(2, "No such file or directory", "c"), "No such file or directory: c"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("a library's own words"), "a library's own words"),
        (ValueError("no number"), "no number"),
    ],
)
def test_causes(cause: Exception, words: str) -> None:
    error = StorageError("it cannot be read", {"file": Path("a/b"), "cause": cause}, "look")
    assert str(error.facts["cause"]) == words
    assert isinstance(error.facts["file"], Path)


def test_what_a_library_says_is_one_line() -> None:
    error = DistillcacheError("it failed", {"cause": ValueError("one\n  two\n"), "found": "as it\nis"})
    assert "cause  one two\n" in str(error)
