"""Where a run's student comes from: the teacher, cut; another checkpoint, cut; or the run's own folder."""

import shutil
from pathlib import Path

from models.checkpoint import load_pretrained, save_pretrained, weights_digest
from models.decoder import Decoder
from models.surgery import apply_surgery
from schemas.config import StudentConfig
from schemas.errors import CheckpointError, ConfigError
from schemas.layout import MANIFEST, TOKENIZER
from schemas.storage import Store
from trainer.checkpoints import STUDENT
from trainer.feed import CacheSource


def open_student(run: Path, config: StudentConfig, source: CacheSource) -> Decoder:
    """The student before its first step, float32: made and kept in the run's folder, or read from there.

    Raises:
        CheckpointError: its checkpoint is missing, or is not the teacher that the cache was built with.
        ConfigError: the surgery cannot be done, or the student does not fit the cache.
    """
    kept = run / STUDENT
    if kept.is_dir():
        return load_pretrained(kept, dtype="float32")
    for unfinished in run.glob(f".{STUDENT}.*"):  # of a killed process
        shutil.rmtree(unfinished)
    path = _checked_teacher(source) if config.init == "teacher" else config.init
    student = apply_surgery(load_pretrained(path, dtype="float32"), config.surgery)
    _check_fit(student, path, source)
    save_pretrained(student, kept, tokenizer_from=_tokenizer(Path(path).expanduser(), run, source))
    return student


def _checked_teacher(source: CacheSource) -> str:
    """The teacher's path, if the very teacher of the cache is still there."""
    teacher = source.plan.teacher
    advice = "set student.init to the path of the teacher's checkpoint"
    try:
        found = weights_digest(teacher.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the cache's teacher cannot be opened: {error.what}", {"cache": source.url, **error.facts}, advice
        ) from error
    if found != teacher.weights_digest:
        raise CheckpointError(
            "the checkpoint at the teacher's path is not the one that the cache was built with",
            {"path": teacher.path, "found": f"digest {found}", "expected": f"digest {teacher.weights_digest}"},
            advice,
        )
    return teacher.path


def _check_fit(student: Decoder, path: str, source: CacheSource) -> None:
    teacher, config = source.plan.teacher, student.config
    sizes = {
        "hidden size": (teacher.hidden_size, config.hidden_size),
        "number of blocks": (teacher.num_blocks, config.num_blocks),
        "vocabulary": (teacher.vocab_size, config.vocab_size),
    }
    for name, (expected, found) in sizes.items():
        if found != expected:
            raise ConfigError(
                f"the cache and the student disagree on the {name}",
                {"cache": f"{source.url}/{MANIFEST}   {expected}", "student": f"{path}   {found}"},
                f"choose a student.init whose {name} is {expected}, or build a cache with another teacher",
            )


def _tokenizer(path: Path, run: Path, source: CacheSource) -> Path:
    """The checkpoint's own tokenizer, or, where it has none, a copy of the one that made the cache's tokens."""
    if path.is_file() or (path / TOKENIZER).exists():
        return path
    store = Store(source.url)
    data = store.read(TOKENIZER)
    if data is None:
        raise CheckpointError("the cache has lost its tokenizer", {"missing": store.where(TOKENIZER)}, "copy it again")
    copy = run / TOKENIZER
    copy.write_bytes(data)
    return copy
