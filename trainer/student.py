"""Where a run's student comes from: the teacher, cut; another checkpoint, cut; or the run's own folder."""

import shutil

from models.checkpoint import load_pretrained, save_pretrained
from models.decoder import Decoder
from models.ggufs import is_gguf
from models.identity import locate_checkpoint
from models.surgery import add_router_bias, apply_surgery
from schemas.errors import CheckpointError, ConfigError
from schemas.layout import MANIFEST, TOKENIZER
from schemas.storage import Store
from schemas.train_config import StudentConfig
from trainer.checkpoints import STUDENT, has_student
from trainer.parameters import Parameters, all_parameters, make_projectors
from trainer.source import Source
from trainer.stack import StudentStack
from trainer.tables import student_spans
from trainer.teacher import check_teacher


def open_student(
    run: Store, config: StudentConfig, source: Source, teacher_path: str | None = None, *, router_bias: bool = False
) -> Decoder:
    """The student before its first step, float32: made and kept in the run's folder, or read from there.

    Args:
        teacher_path: where the source's teacher lies, if not where its plan says.
        router_bias: its experts get biases, of zero where they have none.

    Raises:
        CheckpointError: its checkpoint is missing, or is not the teacher that the cache was built with.
        ConfigError: the surgery cannot be done, or the student does not fit the cache.
    """
    kept = run.where(STUDENT)
    if has_student(run):
        return load_pretrained(kept, dtype="float32")
    for folder in run.local.glob(f".{STUDENT}.*") if run.local is not None else ():  # of a killed process
        shutil.rmtree(folder)
    path = _checked_teacher(source, teacher_path) if config.init == "teacher" else config.init
    student = apply_surgery(load_pretrained(path, dtype="float32"), config.surgery)
    _check_fit(student, path, config, source)
    if router_bias and student.config.moe is not None:
        student = add_router_bias(student)
    save_pretrained(student, kept, tokenizer_from=_tokenizer(path, run, source))
    return student


def start_parameters(student: Decoder, config: StudentConfig, teacher_width: int, seed: int) -> Parameters:
    """All parameters of a student before its first step, with projectors where it has them."""
    found = all_parameters(student)
    if config.projector == "linear":
        places = StudentStack(student).places()
        found |= make_projectors(places, student.config.hidden_size, teacher_width, seed)
    return found


def _checked_teacher(source: Source, path: str | None) -> str:
    """The teacher's path, if the very teacher of the cache is still there."""
    path = path or source.plan.teacher.path
    check_teacher(path, source.url, [source.plan], "set student.init to the path of the teacher's checkpoint")
    return path


def _check_fit(student: Decoder, path: str, config: StudentConfig, source: Source) -> None:
    teacher, found = source.plan.teacher, student.config
    student_spans(found, teacher.num_blocks, config.layer_map)
    sizes = {
        "hidden size": (teacher.hidden_size, found.hidden_size, "set student.projector: linear"),
        "vocabulary": (teacher.vocab_size, found.vocab_size, "choose a student with the teacher's vocabulary"),
    }
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


def _tokenizer(path: str, run: Store, source: Source) -> str:
    """The checkpoint's own tokenizer, or, where it has none, a copy of the one that made the cache's tokens."""
    where = locate_checkpoint(path)
    if is_gguf(where) or (where / TOKENIZER).exists():
        return path
    store = Store(source.url)
    data = store.read(TOKENIZER)
    if data is None:
        raise CheckpointError("the cache has lost its tokenizer", {"missing": store.where(TOKENIZER)}, "copy it again")
    run.write(TOKENIZER, data)
    return run.where(TOKENIZER)
