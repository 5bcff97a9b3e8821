"""Repairs, copies and preparations that are paused while their place is given to another write nothing over it."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distillcache.cache_builder import prepare as prepare_module
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.repair import lost_manifest, restore
from distillcache.cache_builder.repair.from_teacher import repair_cache
from distillcache.cache_builder.text.rows_mark import MARK, keeping_rows, write_mark
from distillcache.schemas.cache.segment import read_manifest
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import FolderTakenError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.rows import INDEX_KEY, RowReader
from distillcache.schemas.store.store import Store
from distillcache.tools.look.verify import verify_cache
from tests.cache_builder.record.test_paused import words_of
from tests.conftest import build_config
from tests.processes.command import Command, run, start


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SEGMENT = "segments/0000"
DAMAGES = {
    "object": f"{SEGMENT}/taps/resid/c/1/0/0/0",
    "rows": f"{SEGMENT}/rows/00001.array_record",
    "index": f"{SEGMENT}/index.bin",
    "stats": f"{SEGMENT}/stats.json",
    "side": f"{SEGMENT}/side.safetensors",
    "times": f"{SEGMENT}/times.json",
    "tokenizer": "tokenizer.json",
    "manifest": "manifest.json",
}


def taken_by_another(place: Path, cache: Path) -> dict[str, bytes]:
    """Another cache in the place, of another plan as far as its manifest says."""
    shutil.rmtree(place)
    shutil.copytree(cache, place)
    store = Store(str(place))
    manifest = read_manifest(store)
    assert manifest is not None
    (entry,) = manifest.segments
    entry = entry.model_copy(update={"index_digest": "0" * 32})
    store.write(layout.MANIFEST, to_canonical(manifest.model_copy(update={"segments": (entry,)})))
    for name in DAMAGES.values():  # in none of these may anything of the repairer's be found
        if name != "manifest.json":
            (place / name).write_bytes(b"another's")
    return files(place)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_repair_writes_nothing_into_another_cache(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place is given away right before the first write, after the damage was found and made again."""
    place = shutil.copytree(cache, tmp_path / "c")
    (place / DAMAGES[kind]).unlink()
    if kind == "times":  # which may be missing
        (place / DAMAGES[kind]).write_bytes(b"damaged")
    taken: list[dict[str, bytes]] = []

    def give_away(real: Callable[..., None]) -> Callable[..., None]:
        def checked(*words: object) -> None:
            if not taken:
                taken.append(taken_by_another(place, cache))
            real(*words)

        return checked

    for module, name in ((restore, "check_listed"), (lost_manifest, "_check_unchanged")):
        monkeypatch.setattr(module, name, give_away(getattr(module, name)))
    with pytest.raises(FolderTakenError):
        repair_cache(Store(str(place)), build_config(place, teacher, corpus, repair=True))
    assert taken
    assert files(place) == taken[0]


@pytest.mark.parametrize("kind", ["object", "index", "manifest"])
def test_a_repair_writes_nothing_over_what_another_repaired(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    (place / DAMAGES[kind]).unlink()
    inodes: list[int] = []

    def repaired_by_another(real: Callable[..., None]) -> Callable[..., None]:
        def checked(*words: object) -> None:
            if not inodes:
                shutil.copy(cache / DAMAGES[kind], place / DAMAGES[kind])
                inodes.append((place / DAMAGES[kind]).stat().st_ino)
            real(*words)

        return checked

    for module, name in ((restore, "check_listed"), (lost_manifest, "_check_unchanged")):
        monkeypatch.setattr(module, name, repaired_by_another(getattr(module, name)))
    config = build_config(place, teacher, corpus, repair=True)
    if kind == "manifest":
        with pytest.raises(FolderTakenError):
            repair_cache(Store(str(place)), config)
    else:
        repair_cache(Store(str(place)), config)
    assert (place / DAMAGES[kind]).stat().st_ino == inodes[0]
    assert files(place) == files(cache)


def preparation(out: Path, corpus: Path, teacher: Path, **changes: object) -> PrepareConfig:
    data = {"path": str(corpus), "row_tokens": 16, "eval_rows": 4, "tokenizer": str(teacher), **changes}
    return PrepareConfig(out=str(out), data=DataConfig.model_validate(data))


@pytest.mark.parametrize("together", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("finished", [False, True], ids=["begun", "finished"])
def test_rows_are_not_written_over_other_rows(
    tmp_path: Path, corpus: Path, teacher: Path, together: bool, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder goes to rows of another length at each write of a preparation in turn."""
    out, config = tmp_path / "rows", preparation(tmp_path / "rows", corpus, teacher)
    if together:
        monkeypatch.setattr(prepare_module, "RESUMABLE_BYTES", 0)
    prepare_rows(preparation(tmp_path / "other", corpus, teacher, row_tokens=32))
    others = files(tmp_path / "other")
    if not finished:
        del others[INDEX_KEY]
        write_mark(Store(str(tmp_path / "mark")), "another's")
        others[MARK] = (tmp_path / "mark" / MARK).read_bytes()
    real, seen = Store.replace, [0]

    def prepare_and_lose_at(at: int) -> None:
        shutil.rmtree(out, ignore_errors=True)
        seen[0] = 0

        def counted(store: Store, key: str, value: bytes, generation: bytes) -> bool:
            seen[0] += 1
            if seen[0] == at:
                shutil.rmtree(out)
                for name, data in others.items():
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (out / name).write_bytes(data)
            return real(store, key, value, generation)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "replace", counted)
            prepare_rows(config)

    prepare_and_lose_at(-1)
    total = seen[0]
    assert total > 3
    assert MARK not in files(out)
    for at in range(2, total + 1, max(1, total // 5)):  # the first is the mark itself: the newest command is right
        with pytest.raises(PlanMismatchError, match=r"no longer belongs to these rows|the rows of another config"):
            prepare_and_lose_at(at)
        assert files(out) == others, at


def test_two_that_make_the_same_rows_share_the_place(tmp_path: Path, corpus: Path, teacher: Path) -> None:
    """One that wakes when the other has finished finds the rows, and writes nothing."""
    config = preparation(tmp_path / "rows", corpus, teacher)
    index = prepare_rows(config)
    before = files(tmp_path / "rows")
    assert prepare_rows(config) == index
    store = Store(str(tmp_path / "rows"))
    write_mark(store, "0" * 32)  # a waking process that had looked for rows.json before
    with pytest.raises(FolderTakenError):
        keeping_rows(store, "0" * 32).write("rows/00000.array_record", b"x")
    assert prepare_rows(config) == index
    assert files(tmp_path / "rows") == before
    assert RowReader(store).index == index


def paused(words: list[str], begun: Callable[[], bool]) -> Command:
    """A command that was stopped once something had happened."""
    process = start(*words)
    deadline = time.monotonic() + 180
    while not begun():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    return process


def woken(process: Command, place: Path) -> str:
    """What the command says when it goes on and ends, having changed nothing."""
    before = files(place)
    try:
        process.send_signal(signal.SIGCONT)
        told = process.communicate(timeout=180)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 2, told
    assert "Traceback" not in told
    assert files(place) == before
    return told


@pytest.mark.slow
def test_a_paused_repair_leaves_the_cache_in_its_place_alone(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    place = tmp_path / "c"
    run(*words_of(place, teacher, corpus))
    objects = sorted(place.glob("segments/0000/taps/resid/c/*/*/0/0"))
    assert len(objects) > 20
    for path in objects:
        path.write_bytes(b"damaged")
    first = paused(
        ["build", "--repair", "--cache", str(place)], lambda: any(path.stat().st_size > 99 for path in objects)
    )
    shutil.rmtree(place)
    run(*words_of(place, teacher, corpus, "--taps.resid.codec", "int8"))
    assert "rebuilt" in woken(first, place)
    assert verify_cache(Store(str(place)))["findings"] == []


@pytest.mark.slow
def test_a_paused_copy_leaves_the_one_in_its_place_alone(cache: Path, tmp_path: Path) -> None:
    place, words = tmp_path / "c", ["copy", str(cache), str(tmp_path / "c"), "--shard-rows", "4", "--batch-rows", "4"]
    first = paused(words, lambda: bool(list(place.glob("segments/0000/claims/*.json"))))
    shutil.rmtree(place)
    run(*words, "--taps.resid.codec", "int8")
    woken(first, place)
    assert verify_cache(Store(str(place)))["findings"] == []


@pytest.mark.slow
def test_a_paused_training_leaves_the_one_in_its_place_alone(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "--run", str(folder), "--cache", str(cache), "--batch-rows", "4", "--checkpoint-every", "5"]
    words += ["--student.surgery", "[{op: query_heads, to: 2, by: index}]", "--eval-teacher", "false"]
    first = paused([*words, "--steps", "4000"], lambda: bool(list(folder.glob("checkpoints/*/checkpoint.json"))))
    before = files(folder)
    second = start(*words, "--steps", "10")
    told = second.communicate(timeout=180)[1]
    assert second.returncode == 2
    assert "another process is training this run" in told
    assert files(folder) == before
    shutil.rmtree(folder)
    run(*words, "--steps", "10")
    assert "no longer this process's" in woken(first, folder)
