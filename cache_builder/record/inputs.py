"""Inputs of a build: the teacher's config and its rows, which are prepared inside the cache if the config names
text."""

import logging

from distillcache.cache_builder.prepare import RESUMABLE_BYTES, open_rows, prepare_rows
from distillcache.cache_builder.text.token_stream import rows_fingerprint
from distillcache.models.checkpoint import read_config
from distillcache.models.config import ModelConfig
from distillcache.models.layers.rope import context_length
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.segment import begun_plan, segment_name
from distillcache.schemas.config import DataConfig, PrepareConfig, Workers
from distillcache.schemas.errors import FolderTakenError, InputError, PlanMismatchError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.rows import RowReader, no_targets_note, too_long_for_teacher
from distillcache.schemas.store.store import Store

log = logging.getLogger(__name__)


def checked_model(teacher: str, named_tokenizer: str | None, tokenizer: TextTokenizer) -> ModelConfig:
    """The teacher's config, if the tokenizer can be its own."""
    model, named = read_config(teacher), named_tokenizer or teacher
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            "the tokenizer does not belong to the teacher",
            {
                "tokenizer": f"{named}  gives ids up to {tokenizer.vocab_size - 1}",
                "teacher": f"{teacher}  knows {model.vocab_size:,} ids",
            },
            "leave out data.tokenizer to use the teacher's own",
        )
    return model


def warn_of_length(data: DataConfig, process_id: int, model: ModelConfig) -> None:
    """Warn, before long work begins, that rows will exceed the teacher's context.

    No refusal: positions are rotations in every family, which have no end, and a test of a stretched context may be
    just what somebody wants.
    """
    rows = open_rows(data)
    row_tokens = data.row_tokens if rows is None else rows.index.row_tokens
    if (said := too_long_for_teacher(row_tokens, context_length(model))) and not process_id:
        log.warning(said)


def open_or_prepare(
    store: Store,
    data: DataConfig,
    workers: Workers,
    tokenizer: TextTokenizer,
    number: int = 0,
    plan: Plan | None = None,
) -> RowReader:
    """The prepared rows that the config names; where it names text, they are prepared inside the cache first.

    Args:
        number: of the segment that they are for.
        plan: of a segment whose rows are made again.
    """
    rows = open_rows(data)
    if rows is None:
        folder = _prepared_folder(store, data, tokenizer, number, plan)
        prepare = PrepareConfig(
            out=f"{store.url}/{folder}",
            data=data,
            **{name: getattr(workers, name) for name in Workers.model_fields},
        )
        _prepare(store, prepare, tokenizer, folder, planned=begun_plan(store, number) is not None)
        rows = RowReader(store, f"{folder}/")
    if without := rows.without_targets():
        log.warning(no_targets_note(without))
    if rows.index.tokenizer_digest != tokenizer.digest:
        raise InputError(
            "the rows were made with another tokenizer than the teacher's",
            {"rows": rows.index.tokenizer_digest, "teacher": tokenizer.digest},
            "prepare them with the teacher's tokenizer, or name theirs with --data.tokenizer",
        )
    return rows


def _prepare(store: Store, config: PrepareConfig, tokenizer: TextTokenizer, folder: str, planned: bool) -> None:
    """Prepare rows inside the cache. Without a plan, what is there belongs to a build that never began."""
    try:
        prepare_rows(config, tokenizer=tokenizer, shared_from_bytes=RESUMABLE_BYTES)
    except FolderTakenError as error:  # finished or deleted by others: `unless_finished` looks which
        raise StorageError(error.what, error.facts, error.next) from error
    except PlanMismatchError:  # another text of the same length
        if planned:
            raise
        store.delete_folder(folder)
        prepare_rows(config, tokenizer=tokenizer, shared_from_bytes=RESUMABLE_BYTES)
    except InputError:  # the text's fault, so no other process of this build gets further
        if not planned:
            store.delete_folder(folder)
        raise


def _prepared_folder(store: Store, data: DataConfig, tokenizer: TextTokenizer, number: int, plan: Plan | None) -> str:
    """Return the folder of this text's rows. Rows of other text or settings never lie there, even if a process was
    paused.

    A segment that an earlier version began has them in its own folder, and so has one that is repaired.
    """
    begun = plan or begun_plan(store, number)
    if begun is not None and (plan is not None or begun.segment == segment_name(number)):
        return f"{layout.segment_prefix(begun.segment)}/prepared"
    return f"{layout.prepared_prefix(number)}/{rows_fingerprint(data, tokenizer)[:16]}"
