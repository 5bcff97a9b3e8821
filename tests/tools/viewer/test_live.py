"""The viewer while a cache is built or a student trained, and of buckets."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the viewer needs the extra `serve`")

from starlette.testclient import TestClient

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.store.store import Store
from distillcache.tools.viewer import watch
from distillcache.tools.viewer.live import shards_a_second
from distillcache.tools.viewer.watch import Committed
from tests.conftest import build_config
from tests.servers.fixtures import Bucket
from tests.tools.look.test_in_buckets import upload
from tests.tools.report.test_command import DIVERGED, DIVERGED_WORDS, NASTY, summarise, write_run
from tests.tools.viewer.serving import half, read, viewer

__all__ = ["half"]  # a fixture


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are seen at once."""
    monkeypatch.setattr(watch, "FRESH_S", 0.0)


def test_a_cache_that_is_being_built(half: Path) -> None:
    client = viewer(half)
    assert "The cache is not finished" in read(client, "/").words
    assert "this row is not committed yet" in read(client, "/row/16", 404).words.lower()
    assert read(client, "/rows").tables["The rows"].row("16")[0] == "not committed yet"
    page = read(client, "/build")
    assert "2 of 5 shards" in page.words
    assert "No process is working on it now" in page.words
    rows = page.tables["The newest shards"].rows[1:]
    assert {cells[0] for cells in rows} == {"0", "1"}
    assert all(cells[2].endswith(" UTC") for cells in rows)
    live = client.get("/build").text
    assert 'data-every="0"' not in live
    assert '<noscript><meta http-equiv="refresh"' in live


def test_a_build_that_goes_on_is_followed(tmp_path: Path, teacher: Path, corpus: Path, half: Path, fresh: None) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(half, folder)
    client = viewer(folder)
    read(client, "/row/3")
    build_cache(build_config(folder, teacher, corpus))
    assert "Slots of resid in this row" in read(client, "/row/30").tables
    assert "The cache is finished" in read(client, "/build").words
    assert "not finished" not in read(client, "/").words


def test_a_cache_without_a_committed_row(tmp_path: Path, teacher: Path, corpus: Path, half: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(half, folder)
    shutil.rmtree(folder / "segments/0000/receipts")
    client = viewer(folder)
    for address, words in (
        ("/", "No shard is committed yet"),
        ("/build", "No shard is committed yet"),
        ("/slot/resid/0", "None is committed yet"),
        ("/search?text=a", "0 rows hold it"),
    ):
        assert words in read(client, address).words


def test_in_a_bucket_shards_have_the_time_at_which_they_were_first_seen() -> None:
    committed, store = Committed(), SimpleNamespace(local=None)
    before = time.time()
    for shards in ((), (3,), (3, 5)):
        committed.look(SimpleNamespace(committed=frozenset(shards), store=store))  # type: ignore[arg-type]
    assert all(at is not None and at >= before for at in committed.times.values())
    known = Committed()
    known.look(SimpleNamespace(committed=frozenset({1}), store=store))  # type: ignore[arg-type]
    assert known.times == {1: None}


def test_speed_is_that_of_the_last_shards() -> None:
    def of(*times: float | None) -> float | None:
        return shards_a_second(Committed(dict(enumerate(times))), 10_000.0)

    assert of(9_960.0, 9_970.0, 9_980.0) == 2 / 40
    assert of(None, None, 9_900.0, 9_950.0) == 1 / 100
    every_minute = [10_000.0 - 60 * minutes for minutes in range(30)]
    np.testing.assert_allclose(of(*every_minute), 1 / 60, rtol=0.01)
    assert of(1.0, 2.0, 3.0, 9_990.0, 9_995.0) == 1 / 10  # a pause does not count
    bursts = [9_950.0 - 300 * burst - at for burst in range(4) for at in range(3)]
    np.testing.assert_allclose(of(*bursts), 6 / 650)  # from the last one before the ten minutes
    every_hour = [9_000.0 - 3_600 * hours for hours in range(3)]
    np.testing.assert_allclose(of(*every_hour), 2 / 8_200)
    assert of() is of(9_900.0) is of(1.0, 2.0) is of(1.0, 2.0, 9_999.0) is None


@pytest.fixture(scope="module")
def of_run(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return viewer(write_run(tmp_path_factory.mktemp("serve") / "run"), "run")


def test_a_runs_pages_have_its_numbers(of_run: TestClient) -> None:
    page = read(of_run, "/")
    assert "blockwise, step 40 of 50" in page.words
    assert page.figures.keys() == {"Held-out perplexity by step", "Loss by term and step"}
    assert page.tables["The run"].row("Cache") == [NASTY]
    assert "<script>alert" not in page.source
    assert 'data-every="0"' not in page.source
    assert read(of_run, "/losses").tables["Terms of the loss"].row("attention output") == ["0.75", "0.01875", "0.01875"]
    page = read(of_run, "/evaluations")
    assert page.tables["Evaluations on held-out rows"].row("20 (best)") == ["30", "0.035", "0.5"]
    assert page.tables["Cosine distance in numbers"].row("0") == ["0.5", "0.025", "-95.0%"]
    assert "There is no checkpoint yet" in page.words
    assert read(of_run, "/experts").tables["Load of the experts"].row("1") == ["1", "2.4", "0", "1"]
    assert read(of_run, "/speed").tables["Speed in numbers"].row("tokens a second")[1] == "1,020.5"
    assert json.dumps(NASTY) in read(of_run, "/config").words


def test_a_run_that_goes_on_is_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    client = viewer(folder, "run")
    before, again = (read(client, "/").source.partition("data-stamp")[2] for _ in range(2))
    assert before == again
    with (folder / "metrics.jsonl").open("a") as file:  # the last line is unfinished
        file.write("}\n" + json.dumps({"step": 50, "distill/total_loss": 0.5}) + "\n")
    page = read(client, "/")
    assert "step 50 of 50" in page.words
    assert page.tables["The run"].row("Last total loss") == ["0.5"]
    assert "diverged" not in page.words
    assert 'data-every="0"' not in page.source  # its last evaluation and its summary may come
    summarise(folder, DIVERGED)
    page = read(client, "/")
    places = [page.words.index(words) for words in [*DIVERGED_WORDS, "Last total loss"]]
    assert places == sorted(places)
    assert 'data-every="0"' in page.source


def test_a_run_that_ended_long_ago_is_not_followed(tmp_path: Path) -> None:
    """Older ones have no summary, and none will come."""
    folder = write_run(tmp_path / "run", steps=50)
    assert 'data-every="0"' in read(viewer(folder, "run"), "/").source


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    client = viewer(tmp_path, "run")
    for address in ("/", "/losses", "/evaluations", "/experts", "/speed", "/config"):
        read(client, address)
    assert "Nothing is written yet" in read(client, "/losses").words


@pytest.mark.slow
def test_pages_of_a_bucket_are_those_of_a_disk(gcs: Bucket, tmp_path: Path, cache: Path, half: Path) -> None:
    """Other kinds of buckets answer a store alike (tests/schemas/store)."""
    run = write_run(tmp_path / "run")
    for name, folder in (("cache", cache), ("half", half), ("run", run)):
        upload(folder, f"{gcs.url}/{name}")
    for name in ("metrics", "router"):  # which a bucket's run has in parts
        Store(gcs.url).write(f"run/{name}/00000000.jsonl", (run / f"{name}.jsonl").read_bytes())
    pages = {
        "cache": (cache, ["/", "/rows", "/row/9", "/row/9/token/3", "/slot/resid/1", "/search?text=longer"]),
        "half": (half, ["/", "/row/3"]),
        "run": (run, ["/", "/losses", "/evaluations", "/experts"]),
    }
    for name, (folder, addresses) in pages.items():
        url, of = f"{gcs.url}/{name}", "run" if name == "run" else "cache"
        far, near = viewer(url, of), viewer(folder, of)
        for address in addresses:
            texts = [read(each, address).source.partition("</h1>")[2] for each in (far, near)]
            same = [text.replace(url, "URL").replace(str(folder), "URL") for text in texts]
            assert same[0] == same[1], address
    build = read(viewer(f"{gcs.url}/half"), "/build")
    assert {cells[2] for cells in build.tables["The newest shards"].rows[1:]} == {"before the viewer began"}
