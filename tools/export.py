"""`distillcache export`: a trained student as an HF directory."""

import json
import sys
from collections.abc import Sequence

from models.checkpoint import save_pretrained
from schemas import settings
from schemas.config import ExportConfig
from trainer.checkpoints import load_student


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Write the student of a run, at its newest checkpoint or the one asked for."""
    config = settings.parse(ExportConfig, argv, command, positional=("run", "out"))
    student = load_student(config.run, config.step)
    save_pretrained(student.decoder, config.out, tokenizer_from=student.tokenizer)
    if as_json:
        print(json.dumps({"run": config.run, "step": student.step, "out": config.out}))
    else:
        print(f"step {student.step} of {config.run} is in {config.out}", file=sys.stderr)
