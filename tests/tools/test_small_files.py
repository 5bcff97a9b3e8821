"""Small files of a cache that are gone, empty or another's: one error in every command that reads them."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cache_builder.build import build_cache
from schemas.errors import DamageError
from schemas.manifest import TapPlan, TapStats
from tests.conftest import build_config
from tools.cli import main
from tools.inspect_warnings import _twice

SEGMENT = "segments/0000"
SMALL = [
    "tokenizer.json",
    *(f"{SEGMENT}/{name}" for name in ("stats.json", "side.safetensors", "taps/resid/zarr.json")),
]
DAMAGES = ("gone", "empty", "foreign")


def exchanged(text: str) -> str:
    """A tokenizer.json with the ids of two tokens exchanged: valid, and another tokenizer."""
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(content)


def damaged(cache: Path, folder: Path, name: str, damage: str) -> Path:
    shutil.copytree(cache, folder, copy_function=os.link)
    path = folder / name
    text = path.read_bytes()
    path.unlink()  # the bytes belong to the cache that is linked
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(exchanged(text.decode()).encode() if name == "tokenizer.json" else text + b" ")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_text_comes_from_another_tokenizer(
    cache: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", "tokenizer.json", damage)
    assert main(["show", str(place), "--row", "1"]) == 2
    error = capsys.readouterr().err
    assert "error: a file of the cache is" in error
    assert "tokenizer.json" in error


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SMALL)
def test_inspect_and_build_name_the_file(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", name, damage)
    assert not main(["inspect", str(place), "--json"])
    assert any(name in warning for warning in json.loads(capsys.readouterr().out)["warnings"])
    for extend in (False, True):
        with pytest.raises(DamageError) as caught:
            build_cache(build_config(place, teacher, corpus, extend=extend))
        assert str(caught.value.facts["file"]).endswith(name)


def test_a_missing_index_is_no_finished_cache(cache: Path, tmp_path: Path, teacher: Path, corpus: Path) -> None:
    place = damaged(cache, tmp_path / "c", f"{SEGMENT}/index.bin", "gone")
    with pytest.raises(DamageError, match="the index of a segment is missing"):
        build_cache(build_config(place, teacher, corpus))


@pytest.mark.parametrize("command", [["show", "--row", "1"], ["stats"], ["inspect"]], ids=lambda each: each[0])
def test_a_lost_manifest_is_no_unfinished_cache(
    cache: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", "manifest.json", "gone")
    assert main([command[0], str(place), *command[1:]]) == 2
    assert "the manifest of a finished cache is missing" in capsys.readouterr().err


def test_slots_that_are_equal_to_the_bit_are_named() -> None:
    stats = TapStats(square_sum=(1.0, 4.0, 2.0, 4.0), abs_max=(1.0, 2.0, 1.5, 2.0), nonfinite=(0,) * 4, count=9)
    tap = TapPlan(name="resid", codec="f32", slots=(0, 2, 4, 6), parts=())
    (sentence,) = _twice(tap, stats)
    assert "slots [2, 6] have equal statistics to the bit" in sentence
    unlike = stats.model_copy(update={"abs_max": (1.0, 2.0, 1.5, 2.5)})
    assert not list(_twice(tap, unlike))
