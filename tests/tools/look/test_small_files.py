"""Small files of a cache that are gone, empty, cut or another's: one right answer in every command that reads them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record import loop as loop_module
from distillcache.schemas.config import BuildConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import DamageError, DistillcacheError, Interrupted
from distillcache.schemas.format.manifest import TapPlan, TapStats
from distillcache.tools.cli import main
from distillcache.tools.fidelity.command import check_fidelity
from distillcache.tools.look.inspect_warnings import _twice
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.folder import read_evaluations
from tests.conftest import build_config, save_teacher
from tests.tools.look.planting import in_every_row, plant

SEGMENT, RECEIPT = "segments/0000", "receipts/00000.json"
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


# file -> commands that need it; verify names it in any case, and inspect, which refuses only what says what there is
NEEDED: dict[str, tuple[str, ...]] = {
    "manifest.json": ("inspect", "show", "stats", "export-samples", "train"),
    f"{SEGMENT}/plan.json": ("inspect", "show", "stats", "export-samples", "train"),
    "tokenizer.json": ("show", "stats"),
    f"{SEGMENT}/index.bin": ("show", "stats", "export-samples", "train"),
    f"{SEGMENT}/side.safetensors": ("show", "stats", "export-samples", "train"),  # of rotated taps
    f"{SEGMENT}/stats.json": (),
    f"{SEGMENT}/times.json": (),
    f"{SEGMENT}/taps/resid/zarr.json": (),
}
ROTATED = TapsConfig(resid=TapConfig(codec="int8", rotate=True, group=8), attn_out=TapConfig(codec="f32"))


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("rotated") / "c"
    build_cache(build_config(folder, teacher, corpus, taps=ROTATED))
    return folder


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The same text by another teacher: the same shapes."""
    base = tmp_path_factory.mktemp("another")
    build_cache(build_config(base / "c", save_teacher(base / "teacher", seed=1), corpus, taps=ROTATED))
    return base / "c"


def spoiled(cache: Path, folder: Path, name: str, damage: str, another: Path) -> Path:
    """A copy with one file that is gone, empty, cut, another cache's, or has two bytes exchanged."""
    shutil.copytree(cache, folder, copy_function=os.link)
    path = folder / name
    data = path.read_bytes()
    path.unlink()  # the bytes belong to the cache that is linked
    at = next(at for at in range(len(data) // 2, len(data)) if data[at] != data[at - 1])
    swapped = data[: at - 1] + data[at : at + 1] + data[at - 1 : at] + data[at + 1 :]
    foreign = (another / name).read_bytes()
    if damage != "gone":
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "foreign": foreign, "swapped": swapped}[damage])
    return folder if path.exists() is False or path.read_bytes() != data else Path()


def asked(place: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Commands that open a cache, as they are called; what trains only reads its first batch."""
    lines = {
        "inspect": ["inspect", str(place), "--json"],
        "show": ["show", str(place), "--row", "1"],
        "stats": ["stats", str(place), "--rows", "2"],
        "export-samples": ["export-samples", str(place), str(out / "s.npz"), "--count", "1"],
    }
    commands: dict[str, Callable[[], object]] = {name: lambda words=words: main(words) for name, words in lines.items()}
    return commands | {"train": lambda: CacheSource(str(place), partial=(place / "building").exists())[[0]] and 0}


def answer(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, standard output and message."""
    try:
        code, message = command(), ""
    except DistillcacheError as error:
        code, message = error.exit_code, str(error)
    said = capsys.readouterr()
    return code, said.out, said.err + message


@pytest.mark.parametrize("name", NEEDED)
def test_every_command_says_the_same_of_a_small_file(
    rotated: Path, another: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in ("gone", "empty", "cut", "foreign", "swapped"):
        place = spoiled(rotated, tmp_path / damage, name, damage, another)
        if place == Path() or (name.endswith("times.json") and damage in ("gone", "foreign")):
            continue  # the other cache has the very same file; of times nothing vouches
        code, out, error = answer(lambda place=place: main(["verify", str(place), "--json"]), capsys)
        found = json.loads(out)
        foreign_manifest = (name, damage) == ("manifest.json", "foreign")  # then it is the plan that is not the listed
        assert code == 2, (damage, error)
        assert any(name in each["object"] for each in found["findings"]) or foreign_manifest
        assert found["rows"]["of"] == 38
        assert bool(found["rows"]["affected"]) == bool(set(NEEDED[name]) & {"train"}), (damage, found)
        if name.endswith("index.bin") and damage == "swapped":
            continue  # the rows of the other shards are as good as ever
        for command, call in asked(place, tmp_path).items():
            if not NEEDED[name] and damage != "cut" and command != "inspect":
                continue  # once is enough for what they do not read
            code, out, error = answer(call, capsys)
            if command in NEEDED[name]:
                assert code == 2, (command, damage, error)
                assert ("error: " in error and Path(name).name in error) or foreign_manifest, (command, damage, error)
            else:
                assert not code, (command, damage, error)
            if command == "inspect" and not code:
                assert any(name in warning for warning in json.loads(out)["warnings"]), (damage, out)


@pytest.fixture(scope="module")
def building(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    return half_built(tmp_path_factory.mktemp("building") / "c", build_config("", teacher, corpus, taps=ROTATED))


@pytest.fixture(scope="module")
def building_another(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    base = tmp_path_factory.mktemp("building_another")
    return half_built(base / "c", build_config("", save_teacher(base / "teacher", seed=1), corpus, taps=ROTATED))


def half_built(folder: Path, config: BuildConfig) -> Path:
    real, commits = loop_module.ShardWriter.add, []

    def add(self: Any, shard: int, *arguments: Any) -> None:
        real(self, shard, *arguments)
        commits.append(shard)
        if len(commits) > 4:
            raise Interrupted("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.ShardWriter, "add", add)
        with pytest.raises(Interrupted):
            build_cache(config.model_copy(update={"cache": str(folder)}))
    (folder / "building").touch()
    return folder


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", *(f"{SEGMENT}/{each}" for each in ("plan.json", "side.safetensors", "receipts/00000.json"))],
)
def test_nothing_is_fine_in_a_cache_that_is_being_built(
    building: Path, building_another: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in ("empty", "cut", "foreign"):
        place = spoiled(building, tmp_path / damage, name, damage, building_another)
        if place == Path() or (name, damage) == (f"{SEGMENT}/side.safetensors", "foreign"):
            continue  # one tokenizer; the same signs, beside norms that only the teacher could tell
        code, out, _ = answer(lambda place=place: main(["verify", str(place), "--json"]), capsys)
        assert code == 2
        named = [each["object"] for each in json.loads(out)["findings"]]
        expected = "receipts/" if (name.endswith("plan.json") and damage == "foreign") else name
        assert any(expected in each for each in named), named
        code, _, error = answer(lambda place=place: main(["stats", str(place), "--rows", "4"]), capsys)
        assert code == 2, (damage, error)


def test_a_build_takes_no_receipt_of_another_plan(
    building: Path, building_another: Path, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    """The shapes are the same, so the shard would be committed with another teacher's digests."""
    place = spoiled(building, tmp_path / "c", f"{SEGMENT}/{RECEIPT}", "foreign", building_another)
    (place / "building").unlink()
    with pytest.raises(DamageError, match="contradicts") as caught:
        build_cache(build_config(place, teacher, corpus, taps=ROTATED))
    assert caught.value.facts["field"] == "plan"


def test_a_lost_plan_is_called_lost(
    building: Path, building_another: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = spoiled(building, tmp_path / "c", f"{SEGMENT}/plan.json", "gone", building_another)
    for words in (["verify"], ["inspect"], ["stats"], ["report", "--out", str(tmp_path / "r.html")]):
        assert main([words[0], str(place), *words[1:]]) == 2
        assert "the plan of a cache is missing" in capsys.readouterr().err
    assert main(["build", "--repair", "--cache", str(place)]) == 2
    assert "the plan of a cache is missing" in capsys.readouterr().err


def test_an_extension_of_a_damaged_cache_is_refused(
    rotated: Path, another: Path, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    place = spoiled(rotated, tmp_path / "a", f"{SEGMENT}/index.bin", "foreign", another)
    for extend in (False, True):
        with pytest.raises(DamageError, match="the index of a segment is not what was committed"):
            build_cache(build_config(place, teacher, corpus, taps=ROTATED, extend=extend))
    place = spoiled(rotated, tmp_path / "b", "manifest.json", "gone", another)
    with pytest.raises(DamageError, match="the manifest of a finished cache is missing"):
        build_cache(build_config(place, teacher, corpus, taps=ROTATED, extend=True))


@pytest.mark.parametrize("name", [f"{SEGMENT}/stats.json", f"{SEGMENT}/taps/resid/zarr.json"])
def test_fidelity_names_a_damaged_file_beside_right_numbers(
    cache: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", name, "gone")
    found = check_fidelity(StoredRows(str(place)), None, 1, 0)
    assert [look["kind"] for look in found["findings"]] == ["damaged-file"]
    assert name in found["verdict"]["line"]
    assert main(["diff", str(cache), str(place), "--rows", "1"]) == 2
    assert name in capsys.readouterr().out


def test_a_recorder_that_is_off_by_one_is_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = plant(cache, tmp_path / "c", in_every_row("resid", lambda values: values[:, [0, 1, 1, 3]]))
    found = check_fidelity(StoredRows(str(place)), None, 2, 0)
    assert found["verdict"]["kind"] == "repeated-block"
    assert "resid 2 holds the teacher's 1; so do resid 1" in found["verdict"]["line"]
    assert "off by one" in found["verdict"]["next"]
    assert not main(["stats", str(place), "--rows", "2", "--json"])
    assert any("slots [1, 2] have equal statistics" in each for each in json.loads(capsys.readouterr().out)["warnings"])


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'[{"step":1,"perplexity":2.0,"blocks":[0],"cosine":[]}]'])
def test_a_damaged_evaluation_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "eval.json").write_bytes(data)
    with pytest.raises(DamageError) as caught:
        read_evaluations(tmp_path)
    assert "eval.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "steps: x", "stages: [1]", "stages: 3", "!!python/x", "a: ["])
def test_a_damaged_config_of_a_run_is_one_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(text)
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "config.yaml" in capsys.readouterr().err
