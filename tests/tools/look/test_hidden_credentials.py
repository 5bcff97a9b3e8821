"""Credentials that earlier versions stored in plans and configs are shown by no command, page or report."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from distillcache.schemas.cache.segment import open_cache, read_manifest
from distillcache.schemas.errors import InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.viewer.run import PAGES as RUN_PAGES
from distillcache.trainer.run.folder import RESOLVED
from tests.tools.report.test_command import write_run
from tests.tools.viewer.serving import viewer

SECRET = "http://user:hush@elsewhere:9000"


def with_secrets(value: Any) -> Any:
    """Nested values whose texts that may hold a place all hold one with credentials."""
    if isinstance(value, dict):
        return {key: with_secrets(inner) if key not in KEPT else inner for key, inner in value.items()}
    if isinstance(value, list):
        return [with_secrets(inner) for inner in value]
    return f"{SECRET}/{value.strip('/')}" if isinstance(value, str) and "/" in value else value


KEPT = ("segment", "format")


def planted(cache: Path, place: Path) -> Path:
    """A copy of the cache as an earlier version may have written it, whole by its own digests."""
    shutil.copytree(cache, place)
    store = Store(str(place))
    plan, manifest = open_cache(store)[0].plan, read_manifest(store)
    assert manifest is not None
    values = plan.model_dump(mode="json")
    config = with_secrets(values["config"]) | {"storage": {"s3_endpoint": SECRET}, "copy": {"src": SECRET}}
    created = dict.fromkeys(values["created"], SECRET) | {"note": SECRET}
    teacher = {**values["teacher"], "path": f"{SECRET}/teacher"}
    changed = Plan.model_validate({**values, "config": config, "created": created, "teacher": teacher})
    data = to_canonical(changed)
    store.write(layout.plan_key("0000"), data)
    (entry,) = manifest.segments
    entry = entry.model_copy(update={"files": {**entry.files, "plan.json": digest_bytes(data)}})
    store.write(layout.MANIFEST, to_canonical(manifest.model_copy(update={"segments": (entry,)})))
    return place


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return planted(cache, tmp_path_factory.mktemp("old") / "cache")


COMMANDS = [
    ["inspect", "{old}"],
    ["show", "{old}", "0"],
    ["stats", "{old}"],
    ["verify", "{old}"],
    ["diff", "{old}", "{cache}"],
    ["diff", "{cache}", "{old}"],
    ["fidelity", "{old}"],
    ["report", "{old}", "--rows", "1", "--out", "{out}"],
    ["build", "--repair", "--cache", "{old}"],
    ["build", "--cache", "{old}", "--teacher.path", "{cache}", "--data.path", "{cache}"],
    ["copy", "{old}", "{new}"],
    ["export-samples", "{old}", "--rows", "0", "--out", "{new}.npz"],
]
OF_RUNS = [["diff", "{run}", "{run}2"], ["report", "{run}", "--out", "{out}"], ["train", "--run", "{run}"]]


def told(words: list[str], capsys: pytest.CaptureFixture[str], **places: object) -> str:
    main([word.format(**places) for word in words])
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0] + words[1][:3])
def test_no_command_shows_what_a_plan_holds(
    old: Path,
    cache: Path,
    tmp_path: Path,
    words: list[str],
    as_json: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "page.html"
    found = told([*words, *as_json], capsys, old=old, cache=cache, out=out, new=tmp_path / "new")
    assert found
    assert "hush" not in found
    assert not out.exists() or "hush" not in out.read_text()


PAGES = ["/", "/rows", "/row/0", "/row/0/token/1", "/slot/resid/0", "/search?q=a", "/build"]


def test_no_page_of_the_viewer_does(old: Path) -> None:
    client = viewer(old)
    for page in PAGES:
        answer = client.get(page)
        assert answer.status_code == 200
        assert "hush" not in answer.text
    assert "***@elsewhere" in client.get("/").text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "run")
    text = f"run: x\ncache: {SECRET}/cache\nsteps: 50\nstudent: {{init: '{SECRET}/student'}}\n"
    (folder / RESOLVED).write_text(text + f"storage: {{s3_endpoint: '{SECRET}'}}\n")
    shutil.copytree(folder, f"{folder}2")
    (Path(f"{folder}2") / RESOLVED).write_text(f"run: y\ncache: {SECRET}/other\nsteps: 50\n")
    return folder


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("words", OF_RUNS, ids=lambda words: words[0])
def test_no_command_shows_what_a_run_holds(
    run: Path, tmp_path: Path, words: list[str], as_json: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    found = told([*words, *as_json], capsys, run=run, out=out)
    assert found
    assert "hush" not in found
    assert not out.exists() or "hush" not in out.read_text()


def test_no_page_of_a_run_does(run: Path) -> None:
    client = viewer(run, "run")
    for _, page in RUN_PAGES:
        answer = client.get(page)
        assert answer.status_code == 200
        assert "hush" not in answer.text


def test_an_errors_parts_are_hidden_too() -> None:
    error = InputError(f"at {SECRET}", {"url": SECRET, "urls": [SECRET]}, f"see {SECRET}")
    assert "hush" not in repr((error.what, error.facts, error.next))
