"""A cache that lost a plan: one advice in every command, and following it works."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.errors import DamageError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from tests.conftest import build_config

READERS = (["inspect"], ["show"], ["stats"], ["verify"], ["verify", "--quick"])


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two further texts."""
    files = [tmp_path_factory.mktemp("more") / f"{number}.txt" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text(f"text number {number}, which the cache has not seen yet. " * 4)
    return files


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, cache: Path, teacher: Path, more: list[Path]) -> Path:
    """Three segments. Read only."""
    place = shutil.copytree(cache, tmp_path_factory.mktemp("extended") / "c")
    for file in more:
        build_cache(build_config(place, teacher, file, extend=True))
    return place


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def foreign(file: Path) -> None:
    plans = sorted(file.parent.parent.glob("*/plan.json"))
    file.write_bytes(next(each for each in plans if each != file).read_bytes())


DAMAGES: list[Callable[[Path], None]] = [Path.unlink, cut, emptied, foreign]


def next_step(text: str) -> str:
    found = re.search(r"next:? +(.*)", text)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("number", [0, 1])
def test_every_command_gives_the_same_advice(
    extended: Path, tmp_path: Path, teacher: Path, corpus: Path, number: int, damage, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(extended, tmp_path / "c")
    plan = sorted(place.glob("segments/*/plan.json"))[number]
    damage(plan)
    steps = []
    for command, *flags in [*READERS, ["build", "--repair", "--cache"]]:
        code = main([command, *flags, str(place)] if command == "build" else [command, str(place), *flags])
        said = capsys.readouterr()
        assert code == 2
        steps.append(next_step(said.err))
    for extend in (False, True):
        with pytest.raises(DamageError) as caught:
            build_cache(build_config(place, teacher, corpus, extend=extend))
        steps.append(caught.value.next)
    assert set(steps) == {steps[0]}
    assert f"copy {plan.relative_to(place)} back" in steps[0]


def test_what_is_advised_for_a_later_segment_works(
    extended: Path, tmp_path: Path, teacher: Path, more: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(extended, tmp_path / "c")
    plans = sorted(place.glob("segments/*/plan.json"))
    plans[1].unlink()
    assert main(["build", "--repair", "--cache", str(place)]) == 2
    step = next_step(capsys.readouterr().err)
    named = re.search(r"delete (manifest\.json), (.*) \(in ", step)
    assert named is not None
    assert named[2].split(", ") == [str(each.parent.relative_to(place)) for each in plans[1:]]
    (place / named[1]).unlink()
    for folder in named[2].split(", "):
        shutil.rmtree(place / folder)
    assert main(["build", "--repair", "--cache", str(place)]) == 0
    assert main(["verify", str(place)]) == 0
    for file in more:
        build_cache(build_config(place, teacher, file, extend=True))
    assert main(["verify", str(place)]) == 0
    counts = [[segment.plan.rows.count for segment in open_cache(Store(str(each)))] for each in (place, extended)]
    assert counts[0] == counts[1]


def test_what_is_advised_for_the_first_segment_works(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    (place / "segments/0000/plan.json").unlink()
    assert main(["verify", str(place)]) == 2
    assert f"delete {place}, and build (or copy) the cache again" in next_step(capsys.readouterr().err)
    shutil.rmtree(place)
    build_cache(build_config(place, teacher, corpus))
    assert main(["verify", str(place)]) == 0


def test_a_lost_plan_without_a_manifest_has_the_same_advice(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    (place / "segments/0000/plan.json").unlink()
    (place / "manifest.json").unlink()
    steps = []
    for words in (["inspect", str(place)], ["verify", str(place)], ["build", "--repair", "--cache", str(place)]):
        assert main(words) == 2
        steps.append(next_step(capsys.readouterr().err))
    assert set(steps) == {steps[0]}
    assert "copy segments/0000/plan.json back" in steps[0]
