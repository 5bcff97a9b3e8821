"""Builders that are paused while their place is given to another: they must never write over the other's work."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record import finish as finish_module
from distillcache.cache_builder.record.finish import tidy
from distillcache.cache_builder.record.loop import guarded_by_plan
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.lease_file import Lease, live_lease, this_process_lease
from distillcache.schemas.cache.segment import (
    begun_plan,
    check_plan_is_ours,
    named_by_plan,
    open_cache,
    read_plan,
    segment_number,
)
from distillcache.schemas.cache.waiting import Waiting
from distillcache.schemas.config import DataConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import FolderTakenError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.store import Store
from distillcache.tools.look.verify import verify_cache
from tests.conftest import build_config
from tests.processes.command import Command, run, start

MLP = TapsConfig(attn_out=TapConfig(codec="bf16"), resid=TapConfig(codec="bf16"), mlp_out=TapConfig(codec="bf16"))


def test_two_plans_of_one_number_have_folders_of_their_own(cache: Path) -> None:
    plan = open_cache(Store(str(cache)))[0].plan.model_copy(update={"segment": "0001"})
    others = [
        plan.model_copy(update={"shard_rows": plan.shard_rows + 1}),
        plan.model_copy(update={"taps": plan.taps[:1]}),
        plan.model_copy(update={"rows": plan.rows.model_copy(update={"content_digest": "0" * 32})}),
        plan.model_copy(update={"numerics": plan.numerics.model_copy(update={"platform": "TPU v9"})}),
    ]
    names = [named_by_plan(each).segment for each in (plan, *others)]
    assert len(set(names)) == 5
    assert {segment_number(name) for name in names} == {1}
    same = plan.model_copy(update={"created": {}, "config": {}, "segment": names[0]})
    assert named_by_plan(same).segment == names[0]


def test_a_write_fails_where_the_place_went_after_the_look_at_it(cache: Path, tmp_path: Path) -> None:
    """Paused between the last check and the write, and the place built anew meanwhile: nothing is overwritten."""
    folder = shutil.copytree(cache, tmp_path / "c")
    store, plan = Store(str(folder)), open_cache(Store(str(folder)))[0].plan
    key = layout.rows_key(plan.segment, 0)

    def replaced() -> None:  # while this process is paused right after its check
        check_plan_is_ours(store, plan)
        if store.read(key) != b"another's":
            store.write(key, b"another's")
            store.write(layout.plan_key(plan.segment), to_canonical(plan.model_copy(update={"created": {}})))

    with pytest.raises(FolderTakenError, match="another plan"):
        store.guarded(replaced).write(key, b"mine")
    assert store.read(key) == b"another's"


@pytest.mark.parametrize("moment", ["write", "replace", "delete", "put_once", "create"])
def test_nothing_is_written_without_the_plan(cache: Path, tmp_path: Path, moment: str) -> None:
    folder = shutil.copytree(cache, tmp_path / "c")
    store, plan = Store(str(folder)), open_cache(Store(str(folder)))[0].plan
    store.delete(layout.plan_key(plan.segment))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    placed = store.guarded(lambda: check_plan_is_ours(store, plan))
    key = "new" if moment == "create" else layout.MANIFEST
    works = {
        "write": lambda: placed.write(key, b"x"),
        "replace": lambda: placed.replace(key, b"x", store.read_with_generation(key)[1]),
        "delete": lambda: placed.delete(key),
        "put_once": lambda: placed.put_once(key, b"x"),
        "create": lambda: placed.create(key, b"x"),
    }
    with pytest.raises(FolderTakenError, match="abandoned or deleted"):
        works[moment]()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_was_written_as_the_plan_went_is_deleted(cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "c")
    store = Store(str(folder))
    plan = named_by_plan(open_cache(store)[0].plan.model_copy(update={"segment": "0001"}))
    store.write(layout.plan_key(plan.segment), to_canonical(plan))

    def work() -> None:
        with guarded_by_plan(store, plan) as placed:
            placed.write(layout.rows_key(plan.segment, 0), b"x")
            store.delete(layout.plan_key(plan.segment))
            placed.write(layout.rows_key(plan.segment, 1), b"x")

    with pytest.raises(FolderTakenError):
        work()
    assert not (folder / layout.segment_prefix(plan.segment)).exists()


def test_a_lost_lease_is_not_written_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    leases = Leases(store, "0000", 0.2)
    assert leases.take(0)
    assert leases.take(1)
    another = this_process_lease(time.time() + 60).model_copy(update={"host": "elsewhere"})
    store.write(layout.lease_key("0000", 0), to_canonical(another))
    store.delete(layout.lease_key("0000", 1))
    time.sleep(0.5)
    assert not leases.holds(0)
    assert not leases.holds(1)
    leases.close()
    assert store.read(layout.lease_key("0000", 0)) == to_canonical(another)
    assert store.read(layout.lease_key("0000", 1)) is None


@pytest.mark.parametrize(
    ("ahead_s", "own_expiry_s", "stated_s", "lives"),
    [
        (50, 60, None, True),
        (86_400, 60, None, False),
        (181, 60, 60.0, False),
        (170, 60, 60.0, True),
        (3_000, 60, 3_600.0, True),
        (1e300, 60, 60.0, False),
        (-1, 60, 60.0, False),
    ],
)
def test_an_expiry_that_no_heartbeat_makes_is_stale(
    ahead_s: float, own_expiry_s: float, stated_s: float | None, lives: bool
) -> None:
    lease = Lease(host="elsewhere", boot="b", pid=1, started="1", expires=1e6 + ahead_s, expiry_s=stated_s)
    assert (live_lease(to_canonical(lease), "lease", 1e6, own_expiry_s) is not None) == lives


def test_a_lease_by_a_clock_that_runs_ahead_holds_nobody_up(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tomorrow = this_process_lease(time.time() + 86_400).model_copy(update={"host": "elsewhere"})
    store.write(layout.lease_key("0000", 0), to_canonical(tomorrow))
    leases = Leases(store, "0000", 60)
    assert leases.take(0)
    leases.close()


def test_who_waits_says_for_whom(console: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("distillcache.schemas.cache.waiting.time.monotonic", lambda: clock[0])
    waiting = Waiting("for work units")
    lease = Lease(host="node-7", boot="b", pid=4711, started="1", expires=86_460.0, since=86_400.0)
    told = []
    for second in range(200):
        clock[0] = float(second)
        waiting.tell(lease)
        if (line := console.readouterr().err) != "":
            told.append((second, line))
    assert [second for second, _ in told] == [5, 35, 95]
    for words in ("4711", "node-7", "since 1970-01-02 00:00:00 UTC", "until 1970-01-02 00:01:00 UTC"):
        assert words in told[0][1]


def test_what_another_finished_meanwhile_is_finished(
    tmp_path: Path, cache: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed build is gone on with, and another builder finishes and tidies up at every one of its accesses."""
    config = build_config(tmp_path / "c", teacher, corpus)

    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "tidy", killed)
        with pytest.raises(Killed):
            build_cache(config)
    (tmp_path / "c/manifest.json").rename(tmp_path / "manifest")
    folder, names = tmp_path / "c", ("_read", "_ask", "keys", "length_is")
    shutil.copytree(folder, tmp_path / "half")
    plan = read_plan(Store(str(folder)), "0000")
    assert plan is not None

    def finish_by_another() -> None:
        shutil.copy(tmp_path / "manifest", folder / "manifest.json")
        tidy(Store(str(folder)), plan)

    def count_and_finish(at: int) -> int:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "half", folder)
        seen = [0]
        with monkeypatch.context() as patch:
            for name in names:
                real = getattr(Store, name)

                def counted(store: Store, *args: object, _real=real, **named: object) -> object:
                    seen[0] += 1
                    if seen[0] == at:
                        finish_by_another()
                    return _real(store, *args, **named)

                patch.setattr(Store, name, counted)
            build_cache(config)
        return seen[0]

    total = count_and_finish(-1)
    assert total > 20
    for at in range(1, total + 1, 1 if os.environ.get("DISTILLCACHE_EVERY_ACCESS") else max(1, total // 12)):
        count_and_finish(at)
        assert verify_cache(Store(str(folder)))["findings"] == [], at


def words_of(cache: Path, teacher: Path, corpus: Path, *more: str) -> list[str]:
    words = ["build", "--cache", str(cache), "--teacher.path", str(teacher), "--data.path", str(corpus)]
    words += ["--data.row-tokens", "16", "--data.eval-rows", "3", "--batch-rows", "4", "--shard-rows", "1"]
    return [*words, "--dtype", "float32", "--claim-expiry-s", "2", *more]


def paused_with_a_lease(words: list[str], cache: Path, number: int) -> Command:
    """A builder that was stopped once it had leased a work unit of this segment."""
    builder = start(*words)
    deadline = time.monotonic() + 120
    while not list(cache.glob(f"segments/{number:04d}*/claims/*.json")):
        assert builder.poll() is None, builder.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    builder.send_signal(signal.SIGSTOP)
    return builder


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_a_paused_extension_leaves_the_next_one_alone(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, delay_s: float
) -> None:
    place = tmp_path / "c"
    run(*words_of(place, teacher, corpus))
    text = tmp_path / "more.jsonl"
    text.write_text("".join(json.dumps({"text": f"some more text {number} " * 9}) + "\n" for number in range(40)))
    first = paused_with_a_lease(words_of(place, teacher, text, "--extend"), place, 1)
    try:
        time.sleep(2.5 + delay_s)
        taps = ["--taps.mlp-out.codec", "bf16", "--extend", "--abandon"]
        run(*words_of(place, teacher, corpus, *taps))
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        assert verify_cache(Store(str(place)))["findings"] == []
        first.send_signal(signal.SIGCONT)
        told = first.communicate(timeout=120)[1]
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 2, told
    assert "abandoned" in told
    assert "Traceback" not in told
    assert verify_cache(Store(str(place)))["findings"] == []
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_paused_build_leaves_the_one_in_its_place_alone(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    place = tmp_path / "c"
    first = paused_with_a_lease(words_of(place, teacher, corpus), place, 0)
    try:
        shutil.rmtree(place)
        run(*words_of(place, teacher, corpus, "--taps.attn-out.codec", "int8"))
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        first.send_signal(signal.SIGCONT)
        told = first.communicate(timeout=120)[1]
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 2, told
    assert verify_cache(Store(str(place)))["findings"] == []
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_an_extension_of_the_version_before_is_gone_on_with(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    """Its folder is called by its number alone."""
    place = shutil.copytree(cache, tmp_path / "c")
    store, config = Store(str(place)), build_config(place, teacher, corpus, taps=MLP, extend=True)
    build_cache(config)
    added = open_cache(store)[1].plan
    shutil.rmtree(place)
    shutil.copytree(cache, place)
    store.write(layout.plan_key("0001"), to_canonical(added.model_copy(update={"segment": "0001"})))
    manifest = build_cache(config)
    assert [entry.segment for entry in manifest.segments] == ["0000", "0001"]
    assert begun_plan(store, 1) == open_cache(store)[1].plan
    assert verify_cache(store)["findings"] == []
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=3, max_rows=20)
    grown = build_cache(build_config(place, teacher, corpus, data=data, taps=MLP, extend=True))
    assert [entry.segment[:5] for entry in grown.segments] == ["0000", "0001", "0002-"]
