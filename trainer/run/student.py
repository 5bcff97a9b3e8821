"""Source of a run's student: a checkpoint with operations applied, random numbers, or the run itself."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from pydantic import BaseModel, TypeAdapter, ValidationError

from distillcache.models.checkpoint import (
    checkpoint_dtype,
    is_same_model,
    load_pretrained,
    read_config,
    save_pretrained,
    weights_digest,
)
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.files.gguf.file import is_gguf
from distillcache.models.files.identity import locate_checkpoint
from distillcache.models.surgery import add_router_bias, changed_config, operate
from distillcache.schemas.cache.segment import read_tokenizer
from distillcache.schemas.config.student import StudentConfig, SurgeryOp
from distillcache.schemas.config.train import TrainSpec
from distillcache.schemas.errors import CheckpointError, ConfigError, StorageError
from distillcache.schemas.format.canonical import from_plain
from distillcache.schemas.format.layout import MANIFEST, TOKENIZER
from distillcache.schemas.format.run import STUDENT
from distillcache.schemas.format.run_identity import check_file
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.source import Source
from distillcache.trainer.feed.teacher import check_teacher
from distillcache.trainer.run.checkpoints import has_student
from distillcache.trainer.run.importance import OpenSource, find_lack, is_measured, teacher_importance
from distillcache.trainer.run.stages import Stage, only_part, part_note
from distillcache.trainer.step.adapters import make_adapters
from distillcache.trainer.step.parameters import (
    PROJECTOR,
    Parameters,
    all_parameters,
    make_projectors,
    sublayer_of,
)
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import FROM_TEACHER, block_starts, check_ascending, real_vocab, student_spans

log = logging.getLogger(__name__)

WITH_ITS_TOKENIZER = "choose a student with the teacher's tokenizer, or build a cache with another teacher"
SURGERY = "surgery.json"  # in the run's folder


def open_student(
    run: Store,
    config: StudentConfig,
    source: Source,
    teacher_path: str | None = None,
    *,
    router_bias: bool = False,
    seed: int = 0,
    open_source: OpenSource | None = None,
    mesh: Mesh | None = None,
    must_differ: bool = False,
) -> Decoder:
    """The student before its first step, float32: made and kept in the run's folder, or read from there.

    Args:
        teacher_path: path of the source's teacher, if not the one in its plan.
        router_bias: its experts get biases, of zero where they have none.
        seed: of `init: random`.
        open_source: the training rows with some taps, for `by: importance`.
        mesh: of several processes: each loads what its own devices hold. Who makes the student has all of it meanwhile.
        must_differ: no loss of the run has anything to teach a student that is the teacher; that of a run that has
            begun is taken as it is.

    Raises:
        CheckpointError: its checkpoint is missing, or is not the teacher that the cache was built with.
        ConfigError: the surgery cannot be done, the student does not fit the cache, or it is the teacher and must not.
    """
    kept = run.where(STUDENT)
    shared = mesh if mesh is not None and mesh.is_multi_process else None
    if has_student(run):
        return load_pretrained(kept, dtype="float32", mesh=shared)
    for folder in run.local.glob(f".{STUDENT}.*") if run.local is not None else ():  # of a killed process
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    path = _checked_teacher(source, teacher_path) if config.init in FROM_TEACHER else config.init
    ops = operations(config, source.plan.teacher.num_blocks)
    _check_fit(changed_config(read_config(path), ops), path, config, source)
    if config.init == "random":
        student = Decoder(changed_config(read_config(path), ops), rngs=nnx.Rngs(seed))
    else:
        student = _operated(run, path, config, ops, open_source)
    if must_differ and _is_teacher(student, path, config, ops, source, teacher_path):
        raise ConfigError(
            "the student is the teacher: the same config and the same weights, so the losses have nothing to teach it",
            {
                "cache": source.url,
                "student.init": config.init,
                "student.surgery": ", ".join(op.spelled for op in config.surgery) or "none",
            },
            "cut it (student.surgery), start from another checkpoint (student.init), or set a loss that can improve "
            "the teacher too: cross-entropy (mode: feature with loss.alpha below 1), or balance of experts",
        )
    if router_bias and student.config.moe is not None:
        student = add_router_bias(student)
    tokenizer = _tokenizer(path, run, source)
    save_pretrained(student, kept, tokenizer_from=tokenizer, source_dtype=checkpoint_dtype(path))
    if shared is None:
        return student
    del student
    return load_pretrained(kept, dtype="float32", mesh=shared)


def kept_student(run: Store) -> Decoder:
    """The student before its first step as it is kept in the run's folder, float32, all of it."""
    return load_pretrained(run.where(STUDENT), dtype="float32")


def operations(config: StudentConfig, teacher_blocks: int) -> list[SurgeryOp]:
    """The student's surgery; a student of the teacher's that has a layer map is made of the blocks named there.

    Raises:
        ConfigError: the layer map does not fit the teacher.
    """
    ops = list(config.surgery)
    if config.layer_map is None or config.init not in FROM_TEACHER or any(op.op == "drop_blocks" for op in ops):
        return ops
    check_ascending(config.layer_map, teacher_blocks)
    dropped = sorted(set(range(teacher_blocks)) - set(config.layer_map))
    return [SurgeryOp(op="drop_blocks", blocks=dropped), *ops] if dropped else ops


def start_parameters(
    student: Decoder, config: StudentConfig, teacher_width: int, seed: int, run: Store | None = None
) -> Parameters:
    """All parameters of a student before its first step, with projectors and adapters where it has them.

    Args:
        run: says to which numbers of the teacher's stream surgery cut the student; its projectors begin with these.
    """
    found = all_parameters(student)
    if config.projector == "linear":
        places, width = StudentStack(student).places(), student.config.hidden_size
        kept = None
        if run is not None and config.init == "teacher" and any(op.op == "hidden_size" for op in config.surgery):
            kept = kept_stream(run)
        found |= make_projectors(places, width, teacher_width, seed, kept)
    if config.lora is not None:
        shapes = {name: value.shape for name, value in found.items() if sublayer_of(name) != PROJECTOR}
        found |= make_adapters(config.lora, shapes, seed)
    return found


def _operated(
    run: Store, path: str, config: StudentConfig, ops: Sequence[SurgeryOp], open_source: OpenSource | None
) -> Decoder:
    """The checkpoint's decoder after these operations; what they kept is written down in the run's folder."""
    start = load_pretrained(path, dtype="float32")
    ops, scores = with_choices(ops, config.init, start.config.num_blocks, open_source), None
    if open_source is not None and any(op.by == "importance" for op in ops):
        scores = teacher_importance(run, start, config.importance_rows, open_source)
    operated = operate(start, ops, scores)
    if ops:
        write_surgery(run, ops, operated.kept)
    return operated.decoder


def with_choices(
    ops: Sequence[SurgeryOp], init: str, num_blocks: int, open_source: OpenSource | None
) -> list[SurgeryOp]:
    """The operations, each with what it chooses by: importance where a config says nothing and rows allow it."""
    upcycled = next((at for at, op in enumerate(ops) if op.op == "upcycle"), len(ops))
    asking = [
        op.by is None and is_measured(op, init) and not (op.op == "experts" and at > upcycled)  # made, not measured
        for at, op in enumerate(ops)
    ]
    if open_source is None or not any(asking):
        return list(ops)
    if (lack := find_lack(num_blocks, open_source)) is not None:
        log.warning(f"surgery chooses by index, not by importance: {lack.what}")
        return list(ops)
    found = [op.model_copy(update={"by": "importance"}) if asks else op for op, asks in zip(ops, asking, strict=True)]
    measured = ", ".join(op.spelled for op, asks in zip(found, asking, strict=True) if asks)
    log.info(f"surgery: {measured}; importance is measured first")
    return found


def _is_teacher(
    student: Decoder,
    path: str,
    config: StudentConfig,
    ops: Sequence[SurgeryOp],
    source: Source,
    teacher_path: str | None,
) -> bool:
    """True where this student, made of the checkpoint at `path`, is the teacher, however that is stored."""
    if config.init == "random":
        return False
    if config.init == "teacher":
        return not ops or is_same_model(path, student)
    plan, teacher = source.plan.teacher, teacher_path or source.plan.teacher.path
    try:
        return is_same_model(teacher, student) and weights_digest(teacher) == plan.weights_digest
    except (CheckpointError, StorageError):  # such a run does not need the teacher, which may be gone
        return not ops and weights_digest(path) == plan.weights_digest


def idle_checkpoint_note(
    spec: TrainSpec, stages: Sequence[Stage], student: Callable[[], Decoder], source: Source, teacher_path: str | None
) -> str | None:
    """`idle_note` of a student made of another checkpoint, such as an export of a cut teacher: by its weights.

    None also where the cache's teacher is gone: such a run does not need it.

    Args:
        student: gives all of it, where it is compared.
    """
    part, init = only_part(spec, stages), spec.student.init
    if part is None or init == "random":
        return None
    teacher = teacher_path or source.plan.teacher.path
    try:
        same = is_same_model(teacher, student(), part) and weights_digest(teacher) == source.plan.teacher.weights_digest
    except (CheckpointError, StorageError):
        return None
    return part_note(stages[0], part, f"the student's checkpoint ({init}) has") if same else None


def write_surgery(run: Store, ops: Sequence[SurgeryOp], kept: Sequence[list[Any]]) -> None:
    """Write what each operation kept: of every block, or of the blocks or the stream (models/surgery/operate.py)."""
    done = [{**op.model_dump(), "kept": each} for op, each in zip(ops, kept, strict=True)]
    run.write(SURGERY, (json.dumps(done) + "\n").encode())


class _Operated(BaseModel):
    """The parts of an operation that are read again."""

    op: str
    kept: list[Any]
    by: str | None = None


def surgery_done(run: Store, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The operations that were asked for, each with the `by` that was used where the default chose it.

    As asked where the run's record of surgery is missing or unreadable, which `lost_warnings` says.
    """
    try:
        done = TypeAdapter(list[_Operated]).validate_json(run.read(SURGERY) or b"[]")
    except ValidationError:
        done = []
    if [each.op for each in done] != [op.get("op") for op in asked]:
        return [dict(op) for op in asked]
    return [
        {**op, "by": each.by} if op.get("by") is None and each.by is not None else dict(op)
        for op, each in zip(asked, done, strict=True)
    ]


def kept_stream(run: Store) -> list[int]:
    """The numbers of the teacher's stream that the student's are.

    Raises:
        CheckpointError: the run does not say.
    """
    if run.read(SURGERY) is not None:  # else the error below says so, of runs of earlier versions too
        check_file(run, SURGERY)
    step = f"copy {SURGERY} again, or begin a new run"
    found = from_plain(TypeAdapter(list[_Operated]), run.read(SURGERY) or b"[]", run.where(SURGERY), step)
    kept = next((op.kept for op in found if op.op == "hidden_size"), None)
    if kept is None:
        raise CheckpointError(
            "the run's record of surgery is missing",
            {"missing": run.where(SURGERY)},
            "copy it again, or start a new run",
        )
    return kept


def _checked_teacher(source: Source, path: str | None) -> str:
    """The teacher's path, if the very teacher of the cache is still there."""
    path = path or source.plan.teacher.path
    check_teacher(path, source.url, [source.plan], "set student.init to the path of the teacher's checkpoint")
    return path


def _check_fit(found: ModelConfig, path: str, config: StudentConfig, source: Source) -> None:
    teacher = source.plan.teacher
    try:
        student_spans(found, teacher.num_blocks, block_starts(config, teacher.num_blocks))
    except ConfigError as error:
        raise _naming_vocabularies(error, found, source) from error
    _check_vocabulary(found, path, source)
    sizes = {"hidden size": (teacher.hidden_size, found.hidden_size, "set student.projector: linear")}
    if config.projector == "linear":
        if found.hidden_size == teacher.hidden_size:
            raise ConfigError(
                "a projector is for students of another width than the teacher's",
                {"hidden size of both": teacher.hidden_size},
                "set student.projector: none",
            )
        del sizes["hidden size"]
    for name, (expected, here, advice) in sizes.items():
        if here != expected:
            raise ConfigError(
                f"the cache and the student disagree on the {name}",
                {"cache": f"{source.url}/{MANIFEST}   {expected}", "student": f"{path}   {here}"},
                f"{advice}, or build a cache with another teacher",
            )


def _naming_vocabularies(error: ConfigError, found: ModelConfig, source: Source) -> ConfigError:
    """The error, with the vocabularies where they differ too: then a layer map alone may not help."""
    real, rows = source.plan.rows.vocab_size, source.plan.teacher.vocab_size
    if found.vocab_size == rows:
        return error
    facts = {
        **error.facts,
        "vocabulary": f"cache {rows:,} rows, {real:,} of them tokens; student {found.vocab_size:,}",
    }
    if found.vocab_size >= real:
        return ConfigError(error.what, facts, f"{error.next}, if the student has the teacher's tokenizer")
    return ConfigError(f"{error.what}, and on the vocabulary", facts, WITH_ITS_TOKENIZER)


def _check_vocabulary(found: ModelConfig, path: str, source: Source) -> None:
    """Teacher and student may differ in rows that no token has; the user is notified once, when the student is made."""
    real, rows = source.plan.rows.vocab_size, source.plan.teacher.vocab_size
    if found.vocab_size < real:
        raise ConfigError(
            "the cache and the student disagree on the vocabulary",
            {
                "cache": f"{source.url}/{MANIFEST}   ids up to {real - 1}",
                "student": f"{path}   {found.vocab_size}",
                "expected": f"{real} or more",
            },
            WITH_ITS_TOKENIZER,
        )
    if real_vocab(found, source) is not None:
        log.info(
            f"note: the teacher's vocabulary has {rows:,} rows, the student's {found.vocab_size:,}; the tokenizer uses "
            f"{real:,}, and the rest is left out of losses and of perplexity"
        )


def _tokenizer(path: str, run: Store, source: Source) -> str:
    """The checkpoint's own tokenizer, or, where it has none, a copy of the one that made the cache's tokens."""
    where = locate_checkpoint(path)
    if is_gguf(where) or (where / TOKENIZER).exists():
        return path
    store = Store(source.url)
    run.write(TOKENIZER, read_tokenizer(store))
    return run.where(TOKENIZER)
