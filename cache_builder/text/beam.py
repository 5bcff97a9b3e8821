"""Rows as an Apache Beam pipeline, for corpora that are prepared by a cluster: Dataflow, Flink, Spark, or this machine.

    distillcache prepare --config prepare.yaml -- --runner DataflowRunner --project P --region R --temp_location
    gs://...

What stands behind `--` is Beam's own. The pipeline does the work of shared.py, in the same unfinished folder
and with the same receipts: Beam hands the work units out in place of leases. So the rows are the same bytes, and a
pipeline that failed goes on from what is receipted, as a pipeline or not.

Workers need this package (`--sdk_container_image`, or `--setup_file`), and must reach the corpus and the rows folder.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]  (the extra `beam`)
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from distillcache.cache_builder.prepare import begin_rows
from distillcache.cache_builder.text.rows_files import RowsJob, RowsPlanned, plan_rows
from distillcache.cache_builder.text.rows_mark import keeping_rows, remove_mark
from distillcache.cache_builder.text.shared import finish_rows, gather_streams, write_packed
from distillcache.cache_builder.text.token_stream import (
    UNFINISHED,
    ChunkStream,
    StreamIndex,
    Unfinished,
    Watch,
    job_fingerprint,
    skipped_in,
    write_chunks,
)
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import PrepareConfig
from distillcache.schemas.format.rows import INDEX_KEY, TOKENIZER_KEY, RowReader, RowsIndex
from distillcache.schemas.store.store import Store, using


def prepare_with_beam(
    config: PrepareConfig,
    options: Sequence[str],
    *,
    tokenizer: TextTokenizer | None = None,
    rows_per_file: int | None = None,
) -> RowsIndex:
    """`prepare_rows`, by a pipeline; returns when it is finished.

    Args:
        options: Beam's own, as words (`--runner`, ...); none: the direct runner.
        tokenizer, rows_per_file: as of `prepare_rows`.

    Raises:
        InputError, PlanMismatchError: as of `prepare_rows`, where they are found before the pipeline runs; later Beam
            raises its own error with theirs in it.
    """
    with using(config.storage):
        job = begin_rows(config, tokenizer, rows_per_file)
        if isinstance(job, RowsIndex):
            return job
        keeping_rows(Store(config.out), job_fingerprint(job)).put_once(TOKENIZER_KEY, job.tokenizer.to_json().encode())
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            add_steps(pipeline, config, job)
        return RowReader(Store(config.out)).index


def add_steps(pipeline: Any, config: PrepareConfig, job: RowsJob) -> None:
    """The steps that write the rows folder: every one takes and gives numbers, all data goes through the store."""
    step = {"config": config, "job": job}
    tokenised = (
        pipeline
        | "Files" >> beam.Create(range(len(job.files)))
        | "Spread files" >> beam.Reshuffle()
        | "Tokenise" >> beam.ParDo(_Tokenise(**step))
        | "All tokenised" >> beam.CombineGlobally(beam.combiners.CountCombineFn())
    )
    packed = (
        tokenised
        | "Plan rows" >> beam.ParDo(_PlanRows(**step))
        | "Spread rows" >> beam.Reshuffle()
        | "Pack" >> beam.ParDo(_Pack(**step))
        | "All packed" >> beam.CombineGlobally(beam.combiners.CountCombineFn())
    )
    _ = packed | "Finish" >> beam.ParDo(_Finish(**step))


class _Step(beam.DoFn):
    """A step on a worker, with its own connection to the store."""

    def __init__(self, config: PrepareConfig, job: RowsJob) -> None:
        super().__init__()
        self._config, self._job = config, job

    def setup(self) -> None:
        fingerprint, store = job_fingerprint(self._job), Store(self._config.out, self._config.storage)
        self._folder = Unfinished(keeping_rows(store, fingerprint), fingerprint)
        self._streams: tuple[ChunkStream, RowsPlanned, StreamIndex] | None = None

    def _planned(self) -> tuple[ChunkStream, RowsPlanned, StreamIndex]:
        if self._streams is None:
            index = gather_streams(self._folder, len(self._job.files))
            stream = ChunkStream(self._folder, index)
            skipped = len(skipped_in(index, self._job))
            self._streams = stream, plan_rows(self._job, stream.length, skipped), index
        return self._streams


class _Tokenise(_Step):
    def process(self, number: int) -> Iterator[int]:
        if self._folder.read_receipt(number) is None:
            with using(self._config.storage):  # the text's
                write_chunks(self._folder, self._job, number, Watch(), digest_only=False)
        yield number


class _PlanRows(_Step):
    def process(self, _: int) -> Iterator[int]:
        yield from range(self._planned()[1].num_files)


class _Pack(_Step):
    def process(self, number: int) -> Iterator[int]:
        stream, planned, _ = self._planned()
        if self._folder.store.read(self._folder.receipt_key("rows", number)) is None:
            write_packed(self._folder, stream, planned, number)
        yield number


class _Finish(_Step):
    def process(self, _: int) -> Iterator[int]:
        if self._folder.store.read(INDEX_KEY) is None:  # a runner may do a step twice
            finish_rows(self._folder, *self._planned())
            store = Store(self._config.out, self._config.storage)
            store.delete_folder(UNFINISHED)
            remove_mark(store)
        yield 0
