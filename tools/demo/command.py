"""`distillcache demo`: the whole job on a real teacher, from text to a recovered student and a report.

text -> rows -> cache of attention outputs and residual stream -> the teacher with a third of its query heads cut ->
blockwise training from the cache -> held-out perplexity of teacher, cut and recovered student.

An interrupted demo goes on when it is run again; a finished one prints its report.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import read_config
from distillcache.models.config import ModelConfig
from distillcache.schemas import command_line
from distillcache.schemas.config import BuildConfig, DataConfig, DemoConfig, TapsConfig, TeacherConfig, TrainConfig
from distillcache.schemas.config.train import StudentConfig, SurgeryOp
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError, DivergedError, PlanMismatchError
from distillcache.schemas.format.layout import DEMO_MARKER
from distillcache.schemas.runtime.memory import PeakMemory
from distillcache.schemas.store.path import local_path
from distillcache.schemas.store.redaction import redacted
from distillcache.schemas.store.whole_file import write_file
from distillcache.tools.demo.report import CHART, make_report, print_report, write_chart
from distillcache.tools.demo.teacher import fetch_teacher
from distillcache.trainer.train import train

REPORT = "report.json"  # in run/; written last
MARKER = DEMO_MARKER
ROW_TOKENS = 128
DEMO_ROWS = 480  # 61,000 tokens, of which 53,000 are trained on: enough for the recovery, two minutes of teacher
EVAL_ROWS = 64
SHARD_MIB = 256  # some ten shards: little is lost when it is interrupted

log = logging.getLogger(__name__)


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Run the demo, or go on with it, and print its report; the exit code."""
    config = command_line.parse(DemoConfig, argv, command)
    out = local_path(config.out, "--out")
    report = _finished_report(out)
    if report is None:
        _check_folder(out)
        with PeakMemory() as peak:
            report = _run_stages(config, out, peak)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
    if report["diverged"]:
        print(report.get("error", report["diverged"]), file=sys.stderr)  # once the words were the value itself
    return DivergedError.exit_code if report["diverged"] else 0


def _finished_report(out: Path) -> dict[str, Any] | None:
    """The report of a finished demo in this folder; its cache and run may be in use by others, so they stay."""
    file = out / "run" / REPORT
    if not ((out / MARKER).exists() and file.exists()):
        return None
    note = "to run another demo, name another folder (--out FOLDER) or remove this one"
    print(f"{out} contains a finished demo: this is its report; {note}", file=sys.stderr)
    return json.loads(file.read_text())


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds something else."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARKER).exists())):
        raise ConfigError(
            "the demo's folder contains something else", {"folder": out}, "name another one: --out FOLDER"
        )


def _make_folder(out: Path) -> None:
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        _write_json(out / MARKER, {})


def _run_stages(config: DemoConfig, out: Path, peak: PeakMemory) -> dict[str, Any]:
    teacher = config.teacher.path if config.teacher else str(fetch_teacher())
    log.info(f"teacher: {redacted(teacher)}")
    model = read_config(teacher)
    surgery = config.surgery or [default_surgery(model)]
    _make_folder(out)  # now that there is a teacher
    seconds: dict[str, float] = json.loads((out / MARKER).read_text())
    data = with_demo_sizes(config.data) if config.data else default_data(out)
    build = build_config(out / "cache", teacher, data, config.batch_rows)
    most = "" if data.max_rows is None else f"at most {counted(data.max_rows, 'row')} of "
    log.info(f"text: {redacted(str(data.path))}, {most}{data.row_tokens:,} tokens")
    log.info(f"step 1 of 2, build: run the teacher once over the text and record its activations in {build.cache}")
    with _timed(seconds, "build", out), _other_flags_explained(out):
        build_cache(build)
    log.info(f"step 2 of 2, train: train a student, cut by {', '.join(map(_said, surgery))}, from the cache")
    with _timed(seconds, "train", out), _other_flags_explained(out):
        result = train(train_config(out / "run", build.cache, surgery, config.steps, config.batch_rows))
    report = make_report(out, teacher, surgery, result, seconds, peak.gigabytes)
    write_chart(report, out / "run" / CHART)
    # Written last: its presence says that the demo is finished.
    _write_json(out / "run" / REPORT, report)
    return report


def _said(op: SurgeryOp) -> str:
    settings = op.model_dump(exclude={"op"}, exclude_defaults=True)
    return " ".join([op.op, *(f"{name} {value}" for name, value in settings.items())])


def build_config(
    cache: Path, teacher: str, data: DataConfig, batch_rows: int, taps: TapsConfig | None = None
) -> BuildConfig:
    """The demo's build; taps: default: the build's own."""
    return BuildConfig(
        cache=str(cache),
        teacher=TeacherConfig(path=teacher),
        data=data,
        taps=taps or TapsConfig(),
        batch_rows=batch_rows,
        shard_mib=SHARD_MIB,
    )


def train_config(run: Path, cache: str, surgery: list[SurgeryOp], steps: int, batch_rows: int) -> TrainConfig:
    """The demo's training."""
    return TrainConfig(
        run=str(run),
        cache=cache,
        student=StudentConfig(surgery=surgery),
        steps=steps,
        batch_rows=batch_rows,
        checkpoint_every=20,  # half a minute of work at most is lost
        eval_every=20,  # a curve, for a few seconds each
    )


@contextmanager
def _other_flags_explained(out: Path) -> Iterator[None]:
    """Re-raise a stage's complaint about an unfinished demo with other flags, with advice in the demo's own flags."""
    try:
        yield
    except PlanMismatchError as error:
        raise PlanMismatchError(
            "the demo's folder contains an unfinished demo with other flags",
            {"folder": out, **error.facts},
            "use its flags, or another folder: --out FOLDER",
        ) from error


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a killed demo must find what it can read."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def default_data(out: Path) -> DataConfig:
    """The reference texts of CPython's own help system: real English prose that is on every machine."""
    from pydoc_data.topics import topics

    folder = out / "corpus"
    lines = [json.dumps({"topic": name, "text": text}) for name, text in sorted(topics.items())]
    write_file(folder / "pydoc_topics.jsonl", ("\n".join(lines) + "\n").encode())
    return with_demo_sizes(DataConfig(path=str(folder)))


def sized_text(folder: Path, row_tokens: int, rows: int, eval_rows: int = 0) -> DataConfig:
    """The demo's text in `folder`, in rows of this size: what the benches measure with."""
    (folder / "corpus").mkdir(exist_ok=True)
    sizes = {"row_tokens": row_tokens, "eval_rows": eval_rows, "max_rows": rows}
    return default_data(folder).model_copy(update=sizes)


def with_demo_sizes(data: DataConfig) -> DataConfig:
    """The user's text with the demo's sizes, so that it stays a demo; explicit settings of the user win."""
    sizes = {"row_tokens": ROW_TOKENS, "eval_rows": EVAL_ROWS, "max_rows": DEMO_ROWS}
    return data.model_copy(update={name: size for name, size in sizes.items() if name not in data.model_fields_set})


def default_surgery(model: ModelConfig) -> SurgeryOp:
    """Two of three query heads of every KV group stay; without groups, two of three KV heads with their queries."""
    group = model.num_heads // model.num_kv_heads
    if group > 1:
        return SurgeryOp(op="query_heads", to=max(1, group * 2 // 3))
    return SurgeryOp(op="kv_heads", to=max(1, model.num_kv_heads * 2 // 3))


@contextmanager
def _timed(seconds: dict[str, float], stage: str, out: Path) -> Iterator[None]:
    """Add what a stage took to `seconds`, also when it is interrupted, and keep the sum for the run that goes on."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 1)
        _write_json(out / MARKER, seconds)
