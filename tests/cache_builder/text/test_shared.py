"""Rows by many processes: the bytes of one, whoever does what, is killed, stopped or too late."""

import gzip
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distillcache.cache_builder import prepare as prepare_module
from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.text import shared as shared_prepare
from distillcache.cache_builder.text import token_stream
from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.cache_builder.text.rows_files import RowsJob
from distillcache.cache_builder.text.rows_mark import write_mark
from distillcache.cache_builder.text.shared import Share, prepare_shared
from distillcache.cache_builder.text.token_stream import ChunkStream, Unfinished, job_fingerprint
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import DamageError, InputError, Interrupted
from distillcache.schemas.format.rows import RowReader, RowsIndex
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from tests.cache_builder.test_prepare import folder_bytes, make_tokenizer
from tests.conftest import build_config
from tests.servers.fixtures import Bucket

ROWS_PER_FILE = 7
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that files have some chunks, and rows reach over several."""
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 60)
    monkeypatch.setattr(shared_prepare, "POLL_S", 0.01)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Nine files of uneven length; one of them is empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    letters = random.Random(0)
    for number in range(9):
        texts = ["".join(letters.choices("abcdefgh", k=letters.choice([0, 3, 15, 16, 90]))) for _ in range(number * 3)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        packed = number % 2 == 0
        (folder / f"{number}.jsonl{'.gz' if packed else ''}").write_bytes(gzip.compress(lines) if packed else lines)
    return folder


def config_for(out: Path | str, corpus: Path | str, **changes: object) -> PrepareConfig:
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=3)
    shared = {name: changes.pop(name) for name in ("workers", "num_processes", "process_id") if name in changes}
    return PrepareConfig(out=str(out), data=data.model_copy(update=changes), **shared)


def alone(tmp_path: Path, corpus: Path, **changes: object) -> dict[str, bytes]:
    """The folder that one process writes in one go."""
    config = config_for(tmp_path / "alone", corpus, **changes)
    prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=ROWS_PER_FILE)
    return folder_bytes(config.out)


def job_of(config: PrepareConfig) -> RowsJob:
    return RowsJob(config.data, make_tokenizer(), tuple(input_files(config.data)), ROWS_PER_FILE)


def begun(config: PrepareConfig) -> RowsJob:
    """The job, in a folder that is marked as its place."""
    job = job_of(config)
    write_mark(Store(config.out), job_fingerprint(job))
    return job


def unfinished_leases(out: str) -> set[str]:
    """The leases on input files that have no receipt."""
    leases, receipts = ({path.name for path in Path(out).rglob(f"{folder}/*.json")} for folder in ("claims", "files"))
    return leases - receipts if len(receipts) < 9 else set()


@pytest.mark.parametrize("max_rows", [None, 1, 20, 10_000])
@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_writes_the_same_folder(
    tmp_path: Path, corpus: Path, processes: int, max_rows: int | None
) -> None:
    changes = {"max_rows": max_rows, "eval_rows": 0}
    expected = alone(tmp_path, corpus, **changes)
    config = config_for(tmp_path / "shared", corpus, num_processes=max(processes, 2), **changes)
    shares = [config.model_copy(update={"process_id": number}) for number in range(processes)]
    settings = {"tokenizer": make_tokenizer(), "rows_per_file": ROWS_PER_FILE}
    threads = [threading.Thread(target=prepare_rows, args=(each,), kwargs=settings) for each in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder_bytes(config.out) == expected
    assert not Path(config.out, "unfinished").exists()


def test_a_large_text_is_prepared_in_units_by_one_process_too(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tmp_path, corpus)
    monkeypatch.setattr(prepare_module, "RESUMABLE_BYTES", 100)
    monkeypatch.setattr(prepare_module, "_prepare_alone", lambda *_: pytest.fail("in one go"))
    config = config_for(tmp_path / "large", corpus)
    prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=ROWS_PER_FILE)
    assert folder_bytes(config.out) == expected


def test_what_is_receipted_is_not_done_again(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(tmp_path, corpus)
    config = config_for(tmp_path / "shared", corpus, num_processes=2)
    store, stop, done = Store(config.out), StopRequest(), []
    write_chunks, write_packed = shared_prepare.write_chunks, shared_prepare.write_packed

    def counting_parts(folder: Unfinished, job: RowsJob, number: int, *rest: object, **named: object) -> object:
        done.append(("file", number))
        stop.requested = len(done) in (4, 13)
        return write_chunks(folder, job, number, *rest, **named)

    def counting_rows(folder: Unfinished, stream: ChunkStream, planned: object, number: int) -> object:
        done.append(("rows", number))
        stop.requested = len(done) == 13
        return write_packed(folder, stream, planned, number)

    monkeypatch.setattr(shared_prepare, "write_chunks", counting_parts)
    monkeypatch.setattr(shared_prepare, "write_packed", counting_rows)
    for _ in range(2):
        with pytest.raises(Interrupted):
            prepare_shared(store, begun(config), Share(0, 2, 60.0), stop)
        assert not unfinished_leases(config.out)  # free for others
        stop.requested = False
    prepare_shared(store, begun(config), Share(1, 2, 60.0), stop)
    store.write("tokenizer.json", make_tokenizer().to_json().encode())
    assert folder_bytes(config.out) == expected
    # A stop is asked for before a work unit is done, so that one work unit may be begun twice.
    assert len(done) <= len(set(done)) + 2


def test_who_comes_too_late_does_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path / "shared", corpus, num_processes=2)
    prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=ROWS_PER_FILE)
    whole = folder_bytes(config.out)
    monkeypatch.setattr(shared_prepare, "write_chunks", lambda *_, **__: pytest.fail("done again"))
    assert prepare_shared(Store(config.out), begun(config), Share(1, 2, 60.0), StopRequest()) is None
    assert folder_bytes(config.out) == whole
    assert not Path(config.out, "unfinished").exists()


def test_of_a_limited_text_the_rest_is_only_digested(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "shared", corpus, num_processes=2, max_rows=4, eval_rows=0)
    receipts, write_chunks = [], shared_prepare.write_chunks

    def remembering(*args: object, **named: object) -> object:
        receipts.append(write_chunks(*args, **named))
        return receipts[-1]

    monkeypatch.setattr(shared_prepare, "write_chunks", remembering)
    prepare_shared(Store(config.out), begun(config), Share(1, 2, 60.0), StopRequest())
    assert receipts[-1].tokens == 0
    assert sum(receipt.tokens for receipt in receipts) < 4 * 16 + 2 * 91


def test_a_bad_line_stops_every_process_and_leaves_nothing_leased(tmp_path: Path, corpus: Path) -> None:
    (corpus / "5.jsonl").write_bytes(b"{")
    config = config_for(tmp_path / "shared", corpus, num_processes=2)
    for process in (0, 1):
        with pytest.raises(InputError, match="not JSON"):
            prepare_shared(Store(config.out), begun(config), Share(process, 2, 60.0), StopRequest())
    assert not unfinished_leases(config.out)


def test_damaged_parts_are_named(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path / "shared", corpus, num_processes=2)
    with monkeypatch.context() as patch:
        patch.setattr(shared_prepare._Work, "_write_rows", lambda *_: pytest.fail("reached"))
        with pytest.raises(pytest.fail.Exception):
            prepare_shared(Store(config.out), begun(config), Share(0, 2, 60.0), StopRequest())
    chunk = next(path for path in sorted(Path(config.out).rglob("tokens/*/*")) if path.stat().st_size)
    chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    with pytest.raises(DamageError, match="not what was written"):
        prepare_shared(Store(config.out), begun(config), Share(0, 2, 60.0), StopRequest())


def test_another_text_or_config_is_other_work(tmp_path: Path, corpus: Path) -> None:
    config = config_for(tmp_path / "shared", corpus)
    first = job_fingerprint(job_of(config))
    (corpus / "0.jsonl.gz").rename(corpus / "00.jsonl.gz")
    assert job_fingerprint(job_of(config)) == first  # names do not count
    (corpus / "1.jsonl").write_text('{"text": "longer than it was before, whatever it was"}\n' * 9)
    assert job_fingerprint(job_of(config)) != first
    assert job_fingerprint(job_of(config_for(tmp_path, corpus, row_tokens=8))) != first


@pytest.mark.parametrize("place", [0, 150_000, -10], ids=["first", "between", "last"])
@pytest.mark.parametrize("size", [300_000, 3 << 20], ids=["short", "long"])
def test_texts_of_one_size_have_marks_of_their_own(tmp_path: Path, size: int, place: int) -> None:
    """Both wrote into one folder while they ran; copies of one text are one work, wherever they lie."""
    prints = []
    for name, letter in (("one", b"a"), ("other", b"b"), ("copy", b"a")):
        (tmp_path / name).mkdir()
        text = bytearray(b"a" * size)
        text[place] = letter[0]
        (tmp_path / name / "text.txt").write_bytes(text)
        data = DataConfig(path=str(tmp_path / name), row_tokens=8, eval_rows=1)
        prints.append(job_fingerprint(RowsJob(data, make_tokenizer(), tuple(input_files(data)), 4)))
    assert prints[0] == prints[2] != prints[1]
    # Edited in place: the length is what it was.
    path = tmp_path / "copy" / "text.txt"
    path.write_bytes(b"a" * (size - 1) + b"c")
    data = DataConfig(path=str(tmp_path / "copy"), row_tokens=8, eval_rows=1)
    assert job_fingerprint(RowsJob(data, make_tokenizer(), tuple(input_files(data)), 4)) != prints[0]


def test_several_builders_share_a_large_text(
    tmp_path: Path, corpus: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillcache.cache_builder.record.inputs.RESUMABLE_BYTES", 1)
    taken = []
    write_chunks = shared_prepare.write_chunks
    monkeypatch.setattr(
        shared_prepare, "write_chunks", lambda *args, **named: taken.append(args[2]) or write_chunks(*args, **named)
    )
    config = build_config(tmp_path / "cache", teacher, corpus, process_id=1, num_processes=2)
    build_cache(config)
    assert taken == [1, 3, 5, 7, 0, 2, 4, 6, 8]  # its own first
    assert not list(Path(config.cache, "segments").glob("*prepared*"))


def start(words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distillcache.tools.cli", "prepare", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_processes_are_replaced_and_the_bytes_stay(tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "corpus", tmp_path / "tokenizer.json"
    folder.mkdir()
    tokenizer.write_text(make_tokenizer().to_json())
    for number in range(8):
        (folder / f"{number:02d}.txt").write_text("".join(random.Random(number).choices("abcdefgh ", k=150_000)))
    words = ["--data.path", str(folder), "--data.tokenizer", str(tokenizer), "--data.eos-token", "<eos>"]
    words += ["--data.row-tokens", "512", "--data.eval-rows", "8"]
    assert start([*words, "--out", str(tmp_path / "quiet")]).wait() == 0
    shared = [*words, "--out", str(tmp_path / "shared"), "--num-processes", "2"]
    commands = [[*shared, "--process-id", "0"], [*shared, "--process-id", "1", "--workers", "2"]]
    dice, deadline, kills = random.Random(time.time_ns()), time.monotonic() + 120, 0
    running = [start(command) for command in commands]
    while any(process.poll() != 0 for process in running):
        assert time.monotonic() < deadline
        time.sleep(dice.uniform(0.1, 1.5))  # they start in 1.5 seconds
        number = dice.randrange(2)
        if kills < 3 and running[number].poll() is None:
            kills += 1
            running[number].send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM]))
        for each, command in enumerate(commands):
            if running[each].poll() not in (None, 0):
                running[each] = start(command)
    assert folder_bytes(str(tmp_path / "shared")) == folder_bytes(str(tmp_path / "quiet"))


@pytest.mark.slow
def test_a_corpus_in_a_bucket_with_faults_gives_the_same_rows(
    tmp_path: Path, corpus: Path, gcs: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 1000)
    for path in sorted(corpus.iterdir())[:5]:
        path.unlink()
    expected = alone(tmp_path, corpus)
    for path in corpus.iterdir():
        Store(gcs.url).write(f"corpus/{path.name}", path.read_bytes())
    config = config_for(f"{gcs.url}/rows", f"{gcs.url}/corpus", num_processes=2)
    with gcs.server.faults(share=0.1, seed=1):
        prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=2 * ROWS_PER_FILE)
    index = RowsIndex.model_validate_json(expected["rows.json"].rpartition(b',"digest"')[0] + b"}")
    found = RowReader(Store(config.out)).index
    assert (found.content_digest, found.text_digest) == (index.content_digest, index.text_digest)
    assert found.documents == index.documents
