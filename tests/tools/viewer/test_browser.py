"""The viewer in a real browser: clicks through rows, tokens, slots and search, the right numbers, live pages that move.

Screenshots of every kind of page, on a phone's and a desk's width, are kept beside those of the reports (browser.py).
"""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the viewer needs the extra `serve`")

import uvicorn

from distillcache.cache_builder.build import build_cache
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.viewer import app, live, run
from distillcache.tools.viewer import page as serve_page
from distillcache.tools.viewer.app import make_app
from distillcache.tools.viewer.command import address_of, listening
from distillcache.trainer.feed.cache_source import CacheSource
from tests.browser import browser, visit
from tests.conftest import build_config
from tests.tools.report.test_command import write_run
from tests.tools.viewer.serving import numbers
from tests.trainer.feed.test_segments import half_built

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.slow


@contextmanager
def served(target: object, kind: str) -> Iterator[str]:
    """The address of a viewer, in a thread."""
    with listening("127.0.0.1", 0) as ear:
        server = uvicorn.Server(uvicorn.Config(make_app(kind, str(target)), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [ear]})
        thread.start()
        try:
            yield address_of(ear, "127.0.0.1").rstrip("/")
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live pages look again after a second."""
    for module in (live, run):
        monkeypatch.setattr(module, "EVERY_S", 1.0)
    monkeypatch.setattr(app, "UNHURRIED", 0)
    monkeypatch.setattr(serve_page, "RELOAD_S", 1)


@pytest.fixture(scope="module")
def viewer(cache: Path) -> Iterator[str]:
    with served(cache, "cache") as address:
        yield address


def cells(page: Any, table: str, first: str) -> list[str]:
    """The cells of a row of a table, by its first one."""
    row = (
        page.get_by_role("table", name=table)
        .get_by_role("row")
        .filter(has=page.get_by_role("rowheader", name=first, exact=True))
    )
    return row.get_by_role("cell").all_inner_texts()


def test_from_the_overview_to_a_token(browser: Any, viewer: str, cache: Path) -> None:
    page = visit(browser, f"{viewer}/", "serve-overview")
    page.get_by_label("row", exact=True).fill("17")
    page.get_by_role("button", name="show the row").click()
    assert page.url == f"{viewer}/row/17"
    norms = np.linalg.norm(numbers(cache, 17, "resid"), axis=-1)
    found = cells(page, "Slots of resid in this row", "2")
    np.testing.assert_allclose(float(found[0]), np.median(norms[2]), rtol=1e-3)
    page.get_by_role("combobox", name="block").select_option("1")
    page.get_by_role("button", name="show them").first.click()
    assert page.get_by_role("table", name="Slots of resid in this row").get_by_role("row").count() == 3
    page.get_by_role("link", name="9", exact=True).click()
    assert page.url == f"{viewer}/row/17/token/9"
    for slot in range(4):
        found = cells(page, "This token in resid", str(slot))
        np.testing.assert_allclose(float(found[0]), norms[slot, 9], rtol=1e-3)
    page.get_by_role("link", name="token 10 →").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Token 10 of row 17"
    page.close()


def test_a_slot_and_its_rows(browser: Any, viewer: str, cache: Path) -> None:
    page = visit(browser, f"{viewer}/slot/resid/2", "serve-slot")
    rows = StoredRows(str(cache)).sample(4, 0)
    batch = CacheSource(str(cache))[rows]
    values = (batch["resid"]["codes"][2].astype(np.uint32) << 16).view(np.float32)[batch["segment_ids"] > 0]
    rms = np.sqrt(np.square(values).mean(0))
    found = cells(page, "The 24 largest of 24 dimensions", str(rms.argmax()))
    np.testing.assert_allclose(float(found[0]), rms.max(), rtol=1e-3)
    page.get_by_role("link", name="slot 3 →").click()
    assert page.get_by_text("the stream leaving the last block").is_visible()
    page.get_by_role("link", name=str(rows[1]), exact=True).click()
    assert page.get_by_role("heading", level=1).inner_text() == f"Row {rows[1]}"
    page.close()


def test_search(browser: Any, viewer: str, cache: Path) -> None:
    page = browser.new_page()
    page.goto(f"{viewer}/search")
    page.get_by_label("text, case-insensitive").fill("LONGER")
    page.get_by_role("button", name="search").click()
    assert page.locator("mark").first.inner_text() == "longer"
    page.get_by_role("link", name="Row").first.click()
    assert page.get_by_text("longer").first.is_visible()
    page.close()
    visit(browser, f"{viewer}/search?text=long", "serve-search").close()


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("rows", "/rows"),
        ("row", "/row/37"),
        ("block", "/row/3?block=1"),
        ("token", "/row/3/token/5"),
        ("build", "/build"),
    ],
)
def test_every_page_of_a_cache_is_sound(browser: Any, viewer: str, name: str, address: str) -> None:
    visit(browser, viewer + address, f"serve-{name}").close()


def test_the_pages_of_a_run_are_sound_and_follow_it(browser: Any, tmp_path: Path, hurried: None) -> None:
    folder = write_run(tmp_path / "run")
    with served(folder, "run") as address:
        for name in ("evaluations", "experts", "config"):
            visit(browser, f"{address}/{name}", f"serve-run-{name}").close()
        page = visit(browser, f"{address}/", "serve-run")
        assert page.get_by_text("blockwise, step 40 of 50").is_visible()
        with (folder / "metrics.jsonl").open("a") as file:  # the last line is unfinished
            file.write("}\n" + json.dumps({"step": 50, "distill/total_loss": 0.5}) + "\n")
        page.get_by_text("blockwise, step 50 of 50").wait_for(timeout=30_000)
        assert not page.get_by_text("It is finished.").is_visible()  # its last evaluation may be at work
        (folder / "summary.json").write_text(json.dumps({"run": str(folder), "steps": 50, "diverged": False}))
        page.get_by_text("It is finished.").wait_for(timeout=30_000)
        page.close()


def test_a_build_moves_with_and_without_a_script(
    browser: Any, tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    config = build_config(tmp_path / "cache", teacher, corpus)
    half_built(config, monkeypatch, 2)
    with served(config.cache, "cache") as address:
        page = visit(browser, f"{address}/build", "serve-building")
        assert page.get_by_role("progressbar").evaluate("bar => bar.value") == 2
        assert page.get_by_label("follow").is_checked()
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(f"{address}/build")
        assert plain.get_by_text("2 of 5 shards").first.is_visible()
        build_cache(config)
        page.get_by_text("The cache is finished.").first.wait_for(timeout=30_000)
        plain.get_by_text("The cache is finished.").first.wait_for(timeout=30_000)
        page.close()
        plain.context.close()


def test_damage_is_shown_in_the_tools_words(browser: Any, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / "segments/0000/taps/resid/c/0/0/0/0").write_bytes(b"short")
    with served(folder, "cache") as address:
        page = visit(browser, f"{address}/row/0", "serve-damaged")
        assert page.get_by_text("a stored object is not what was committed").is_visible()
        assert page.get_by_role("table", name="Slots of attn_out in this row").is_visible()
        page.close()


def test_the_command_says_where_it_is_and_ends_quietly(cache: Path) -> None:
    """As by Ctrl-C. (Python leaves SIGINT ignored where it finds it so, as in a shell's background.)"""
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from distillcache.tools.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "serve", str(cache), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (said["of"], said["target"]) == ("cache", str(cache))
        with urlopen(said["url"]) as answer:
            assert b"38 rows of 16 tokens" in answer.read()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, ("", ""))
