"""Rows by an Apache Beam pipeline on its direct runner: the bytes of one process, also after a failure."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.text import token_stream
from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.cache_builder.text.rows_files import RowsJob
from distillcache.cache_builder.text.token_stream import Unfinished, Watch, job_fingerprint, write_chunks
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.rows import RowsIndex
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from tests.cache_builder.test_prepare import folder_bytes, make_tokenizer, write_lines

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="apache-beam is not installed: pip install -e '.[beam]'")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        write_lines(folder / f"{number}.jsonl", ["abcdefgh" * (n % 9) for n in range(number, 20 * number)])
    return folder


def config_for(out: Path, corpus: Path, **data: object) -> PrepareConfig:
    return PrepareConfig(
        out=str(out), data=DataConfig(path=str(corpus), row_tokens=16, eval_rows=3).model_copy(update=data)
    )


def run(config: PrepareConfig) -> RowsIndex:
    from distillcache.cache_builder.text.beam import prepare_with_beam

    return prepare_with_beam(config, ["--runner", "DirectRunner"], tokenizer=make_tokenizer(), rows_per_file=7)


@needs_beam
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_a_pipeline_writes_the_same_folder(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distillcache.cache_builder.prepare import prepare_rows

    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 500)
    for max_rows in (None, 20):
        one = config_for(tmp_path / f"one-{max_rows}", corpus, max_rows=max_rows)
        other = config_for(tmp_path / f"beam-{max_rows}", corpus, max_rows=max_rows)
        expected = prepare_rows(one, tokenizer=make_tokenizer(), rows_per_file=7)
        assert run(other) == expected
        assert run(other) == expected  # finished rows are left alone
        assert folder_bytes(other.out) == folder_bytes(one.out)


@needs_beam
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_goes_on_from_what_is_receipted(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillcache.cache_builder.text import beam

    config = config_for(tmp_path / "beam", corpus)
    job = RowsJob(config.data, make_tokenizer(), tuple(input_files(config.data)), 7)
    folder = Unfinished(Store(config.out), job_fingerprint(job))
    write_chunks(folder, job, 3, Watch(), digest_only=False)
    numbers = []

    def noted(folder: Unfinished, job: RowsJob, number: int, *others: Any, **options: Any) -> None:
        numbers.append(number)
        write_chunks(folder, job, number, *others, **options)

    monkeypatch.setattr(beam, "write_chunks", noted)
    index = run(config)
    assert sorted(numbers) == [0, 1, 2]
    assert run(config) == index
    (corpus / "bad.jsonl").write_bytes(b"{")
    with pytest.raises(Exception, match="not JSON"):
        run(config_for(tmp_path / "bad", corpus))


@pytest.mark.skipif(HAS_BEAM, reason="apache-beam is installed")
def test_without_beam_the_extra_is_named(tmp_path: Path, corpus: Path, console: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--out", str(tmp_path / "out"), "--data.path", str(corpus), "--", "--runner", "DirectRunner"]
    assert cli.main(words) == InputError.exit_code
    assert "pip install -e '.[beam]'" in console.readouterr().err
