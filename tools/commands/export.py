"""`distillcache export`: write a trained student as an HF directory, in MaxText's format, or as an adapter for peft."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distillcache.models.checkpoint import save_pretrained
from distillcache.models.files.adapter import save_adapter
from distillcache.models.files.export import BASE
from distillcache.models.files.maxtext.export import save_maxtext
from distillcache.models.files.tensors import ROUTER_BIAS_FILE
from distillcache.schemas import command_line
from distillcache.schemas.config import ExportConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.run_identity import IDENTITY, STUDENT
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.store import using
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.evaluate import told_perplexity
from distillcache.trainer.run.folder import best_evaluation, missing_checkpoints


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Write the student of a run, at its newest checkpoint, the best one or the one asked for."""
    config = command_line.parse(ExportConfig, argv, command, positional=("run", "out"))
    with using(config.storage):
        if config.best and config.step is not None:
            raise ConfigError("--best and --step both name a checkpoint", {"--step": config.step}, "give one of them")
        step, note = config.step, ""
        if config.best:
            best = best_evaluation(config.run)
            step, note = best.step, f", the best with a held-out perplexity of {told_perplexity(best.perplexity)},"
            if best.perplexity is None:
                note = f", the best with a held-out cosine distance of {best.mean_cosine:.3g},"
        _refuse_a_runs_student(config.out)
        student = load_student(config.run, step, config.dtype, merges=not config.adapter)
        for each in missing_checkpoints(config.run, best=config.best, step=config.step):
            print(f"warning: {each}", file=sys.stderr)
        if student.trained is not None:
            made = {"tokenizer_from": student.tokenizer, "dtype": config.dtype or "float32"}
            save_adapter(student.trained, student.decoder, config.out, **made)
            note = f"{note or ','} as adapters of the model in {config.out.rstrip('/')}/{BASE},"
        else:
            save = save_maxtext if config.format == "maxtext" else save_pretrained
            save(student.decoder, config.out, tokenizer_from=student.tokenizer)
    moe = student.decoder.config.moe
    if config.format == "hf" and moe is not None and moe.bias and not moe.native_bias:
        print(
            f"warning: {student.decoder.config.family} cannot store router biases: they are in {ROUTER_BIAS_FILE}, "
            "which other readers ignore; eval/student_perplexity_without_bias says what they will see",
            file=sys.stderr,
        )
    if as_json:
        print(
            json.dumps(
                {"run": config.run, "step": student.step, "out": config.out, "dtype": str(student.decoder.dtype)}
            )
        )
    else:
        print(
            f"wrote step {student.step} of {config.run}{note} to {config.out}, in {student.decoder.dtype}",
            file=sys.stderr,
        )


def _refuse_a_runs_student(out: str) -> None:
    """Raise `ConfigError` for the student that a run began with: it looks like an export, and the run needs it."""
    place = locate(out)
    folder = Path(os.path.realpath(place)) if isinstance(place, Path) else place
    if folder.name == STUDENT and (folder.parent / IDENTITY).exists():
        raise ConfigError(
            "the target of an export is the student with which a run began",
            {"out": out, "run": folder.parent},
            "name another directory: without its first student the run can be neither resumed nor exported",
        )
