"""Files that commands write at the user's wish: another's file in their place is never lost."""

from pathlib import Path

import pytest

from distillcache.tools.cli import main

COMMANDS = {
    "report.html": ["report", "{cache}", "--rows", "0", "--out", "{file}"],
    "dimensions.npz": ["stats", "{cache}", "--rows", "2", "--out", "{file}"],
    "row.svg": ["show", "{cache}", "--image", "{file}"],
    "row.png": ["show", "{cache}", "--image", "{file}"],
    "samples.npz": ["export-samples", "{cache}", "{file}", "--rows", "[0]"],
    "samples.safetensors": ["export-samples", "{cache}", "{file}", "--rows", "[0]"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_the_user_is_kept_and_one_of_ours_replaced(
    name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    command = [word.format(cache=cache, file=file) for word in COMMANDS[name]]
    file.write_bytes(b"what the user has there")
    assert main(command) == 2
    assert "this command did not make it" in capsys.readouterr().err
    assert file.read_bytes() == b"what the user has there"
    file.unlink()
    assert main(command) == 0
    assert "replaced" not in capsys.readouterr().err
    made = file.read_bytes()
    assert main(command) == 0
    assert "is there from an earlier command, and is replaced" in capsys.readouterr().err
    assert len(file.read_bytes()) == len(made)
