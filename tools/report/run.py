"""Sections of a report about a run: description, losses, speed, config.

Those about evaluations and experts lie beside this module.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.checkpoint import SavedArrays
from distillcache.schemas.format.run import EVALUATIONS, checkpoint_key, lost_evaluations, whole_steps
from distillcache.schemas.format.run_identity import IDENTITY, changed_records, without_identity
from distillcache.schemas.store.redaction import redacted
from distillcache.schemas.store.store import Store
from distillcache.tools.pages.figures import SERIES, Figure, Line, draw_lines
from distillcache.tools.pages.html import (
    Numeric,
    Page,
    code,
    facts,
    figures,
    folded,
    note,
    number,
    page_title,
    paragraph,
    progress,
    table,
)
from distillcache.tools.report.curves import POINTS, BlockCurves, Curve, block_curves, block_picture, curve, series
from distillcache.tools.report.evaluations import block_fragments, evaluation_fragments
from distillcache.tools.report.experts import expert_fragments, expert_warnings
from distillcache.trainer.run.checkpoints import Checkpoints
from distillcache.trainer.run.evaluate import Evaluation, told_perplexity
from distillcache.trainer.run.folder import RESOLVED, Ending, best_of, read_ending, read_evaluations, shown_config
from distillcache.trainer.run.metrics_log import TENSORBOARD, find_lost_lines, read_loads, read_metrics
from distillcache.trainer.run.student import surgery_done
from distillcache.trainer.step.modes import MODES

TERMS = {
    "distill/total_loss": "total",
    "distill/out_proj_feature_loss": "attention output",
    "distill/mlp_loss": "MLP output",
    "distill/block_loss": "whole block",
    "distill/stream_loss": "stream",
    "distill/hard_loss": "cross-entropy",
    "distill/soft_loss": "KL to the teacher",
    "distill/moe_lb_loss": "load balance",
    "distill/router_z_loss": "router z",
}
WAIT, MFU = "perf/data_wait_share", "perf/mfu"
WAITING = 0.2  # of the time: then the feed is what limits the run
WAITING_DRAWN = 0.01  # of a step: shorter waits are noise, and their median in the table says enough
WORSE = 1.05  # times the best perplexity: more than the noise of a usual set of held-out rows
POOLED_STEPS = " Points are means of neighbouring steps; the band spans their minimum and maximum."


def run_page(store: Store, footer: str) -> tuple[Page, dict[str, Any]]:
    """The page, and a summary of it as plain values.

    Raises:
        StorageError: the run cannot be read.
    """
    words, config = shown_config(store)
    lines, evaluations, loads = read_metrics(store.url), read_evaluations(store), read_loads(store.url)
    done, of = (lines[-1]["step"] if lines else 0), planned_steps(config)
    ending = read_ending(store)
    told = [*divergence_warnings(ending), *warnings(lines, evaluations, done, of), *expert_warnings(loads)]
    told += lost_warnings(store)
    page = Page(page_title("Run", store.url), run_subtitle(config, done, of), footer)
    page.add(
        "What it is",
        note("Look at this first", told),
        progress("Steps", done, of) if done < of else "",
        run_facts(store, config, lines, evaluations),
    )
    page.add("Evaluations", *evaluation_fragments(evaluations))
    page.add("Blocks before and after", *block_fragments(evaluations))
    page.add("Loss", *loss_fragments(lines))
    page.add("Experts", *expert_fragments(lines, loads))
    page.add("Speed", *speed_fragments(lines))
    page.add("Config", folded("config.yaml", code(words, "The resolved config")) if words else "")
    diverged = None if ending is None else ending.diverged
    return page, {"of": "run", "steps": {"done": done, "of": of}, "diverged": diverged, "warnings": told}


def divergence_warnings(ending: Ending | None) -> list[str]:
    """Return why the run diverged and which of its checkpoints is the best; nothing where it did not."""
    if ending is None or not ending.diverged:
        return []
    what, *rest = redacted(ending.error).splitlines() or ["no reason is given"]
    # `label  value`, as messages are spelled; where the run lay then says nothing about where it lies now.
    found = dict(([*re.split(r" {2,}", line.strip(), maxsplit=1), ""])[:2] for line in rest)
    kept = "none was kept" if ending.best_checkpoint is None else f"step {ending.best_checkpoint}"
    best = found.pop("best checkpoint", kept)
    for label in ("run", "next"):
        found.pop(label, None)
    figures = "; ".join(f"{label} {value}".rstrip() for label, value in found.items())
    reason = what.removeprefix("error: ") + (f" ({figures})" if figures else "")
    return [f"The run diverged: {reason}.", f"Best checkpoint: {best}."]


def lost_warnings(store: Store) -> list[str]:
    """Return warnings about files of the run that are missing, damaged or changed."""
    told, steps = [f"{each}." for each in find_lost_lines(store)], whole_steps(store)
    if store.read(IDENTITY) is None:
        told.append(f"{IDENTITY} is missing: {without_identity(store)}.")
    told += [f"{each}." for each in changed_records(store)]
    if count := lost_evaluations(store):
        told.append(f"{EVALUATIONS} is missing; it had {counted(count, 'evaluation')}.")
    for step in steps:
        try:
            SavedArrays(store, checkpoint_key(step))
        except DamageError as error:
            if step not in whole_steps(store):  # the run has made room for a newer one meanwhile
                continue
            told.append(f"The checkpoint of step {step:,} is damaged: {error.next}.")
    ending = read_ending(store)
    ended = None if ending is None or ending.diverged else ending.steps
    if ended is not None and ended not in steps:
        told.append(f"The run ended at step {ended:,}, whose checkpoint is gone.")
    return told


def warnings(lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation], done: int, of: int) -> list[str]:
    """Return warnings about the curves."""
    told = [] if done >= of else [f"The run is at step {done:,} of {of:,}."]
    _, waits = series(lines, WAIT)
    if len(waits) > 2 and (share := float(np.median(waits[len(waits) // 2 :]))) > WAITING:
        told.append(f"It spends {share:.0%} of the time waiting for data (median of the later half).")
    trained = [entry for entry in evaluations if entry.step]
    if evaluations and evaluations[-1].perplexity is None:
        told.append("No token of the held-out rows is a target: perplexity and KL are undefined there.")
    known = [(entry.step, entry.perplexity) for entry in trained if entry.perplexity is not None]
    if known:
        (step, last), (best_step, best) = known[-1], min(known, key=lambda pair: pair[1])
        if last > WORSE * best:
            told.append(
                f"Held-out perplexity was best at step {best_step:,} ({best:.4g}) and is {last:.4g} at step {step:,}: "
                "export it with --best."
            )
    if evaluations and trained and evaluations[0].step == 0:
        first, last = evaluations[0], trained[-1]
        if first.perplexity is not None and last.perplexity is not None and last.perplexity > first.perplexity:
            told.append(f"Held-out perplexity rose from {first.perplexity:.4g} to {last.perplexity:.4g}.")
        before = dict(zip(first.blocks, first.cosine, strict=True))
        worse = [
            block for block, after in zip(last.blocks, last.cosine, strict=True) if after > before.get(block, after)
        ]
        if worse:
            told.append(f"The cosine distance rose in blocks {', '.join(map(str, worse))}.")
    return told


def planned_steps(config: Mapping[str, Any]) -> int:
    """Count the steps that the config asks for, over all stages.

    Raises:
        DamageError: it is no config of a run.
    """
    stages = config.get("stages") or [config]
    stages = stages if isinstance(stages, list) else [stages]
    steps: list[Any] = [stage.get("steps", 0) if isinstance(stage, Mapping) else None for stage in stages]
    if not all(isinstance(each, int) for each in steps):
        facts = {"file": RESOLVED, "found": f"steps {steps}"}
        raise DamageError("the config of a run has no numbers of steps", facts, "copy it again from its source")
    return sum(steps)


def run_subtitle(config: Mapping[str, Any], done: int, of: int) -> str:
    """Mode or stages, and how far it is."""
    stages = config.get("stages")
    mode = "stages: " + ", ".join(f"{stage.get('mode')}" for stage in stages) if stages else config.get("mode", "")
    return f"{mode}, step {done:,} of {of:,}"


def run_facts(
    store: Store, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]
) -> str:
    """Return facts and progress of the run as a table."""
    _, losses = series(lines, "distill/total_loss")
    student = config.get("student", {})
    surgery = ", ".join(_operation(each) for each in surgery_done(store, student.get("surgery") or []))
    loss = ", ".join(f"{name} {as_yaml(value)}" for name, value in _weights(config.get("loss", {})))
    best = best_of(evaluations)
    return facts(
        "The run",
        {
            "Run": store.url,
            "Begun": _begun(store),
            "Cache": config.get("cache"),
            "Source": config.get("source"),
            "Student": f"{_start_of(student)}{f', after {surgery}' if surgery else ''}",
            "Adapters": ", ".join(f"{k} {as_yaml(v)}" for k, v in (student.get("lora") or {}).items()) or None,
            "Loss settings": loss or None,
            "Optimizer": ", ".join(f"{k} {v}" for k, v in optimizer_words(config).items()) or None,
            "Batch": f"{_rows(config.get('batch_rows'))}, computed in {config.get('compute_dtype')}",
            "Last total loss": f"{losses[-1]:.5g}" if len(losses) else None,
            **_perplexity_words(evaluations),
            **_best_words(best),
            "Checkpoints": ", ".join(f"{step:,}" for step in Checkpoints(store).steps()) or "none",
        },
    )


def optimizer_words(config: Mapping[str, Any]) -> dict[str, str]:
    """The optimizer's settings; a learning rate that was left to the modes is theirs."""
    optimizer = config.get("optimizer", {})
    found = {name: as_yaml(value) for name, value in optimizer.items()}
    if "learning_rate" in optimizer and optimizer["learning_rate"] is None:
        modes = dict.fromkeys(stage.get("mode") for stage in config.get("stages") or [config])
        rates = [f"{MODES[mode].usual_rate:g} ({mode} mode)" for mode in modes if mode in MODES]
        found["learning_rate"] = " and ".join(rates)
    return found


def _start_of(student: Mapping[str, Any]) -> str:
    return "the teacher" if student.get("init", "teacher") == "teacher" else f"weights of {student['init']}"


def _operation(op: Mapping[str, Any]) -> str:
    """`query_heads (to 2, by index)`."""
    settings = ", ".join(f"{name} {as_yaml(value)}" for name, value in op.items() if name != "op" and value is not None)
    return f"{op.get('op')} ({settings})" if settings else str(op.get("op"))


def _perplexity_words(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """The teacher's, the student's at the start and now, and the share of the gap that is closed."""
    if not evaluations:
        return {}
    first, last = evaluations[0], evaluations[-1]
    known = last.teacher_perplexity
    unknown = f"not known: {last.teacher_unknown or 'it was not measured'}"
    found = {"Teacher's held-out perplexity": unknown if known is None else f"{known:.5g}"}
    if first.step == 0:
        found["Held-out perplexity at the start"] = told_perplexity(first.perplexity, ".5g")
    found["Last held-out perplexity"] = told_perplexity(last.perplexity, ".5g")
    return found | ({} if last.gap_closed is None else {"Share of the gap closed": f"{last.gap_closed:,.1%}"})


def _best_words(best: Evaluation | None) -> dict[str, str]:
    if best is None:
        return {}
    if best.perplexity is None:
        return {"Best mean cosine distance": f"{best.mean_cosine:.5g} at step {best.step:,}"}
    return {"Best held-out perplexity": f"{best.perplexity:.5g} at step {best.step:,}"}


def _weights(loss: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Describe the weights that are not zero: a number, or a ramp; of a term with several numbers, its weight."""
    found = []
    for name, value in loss.items():
        weight = value.get("weight", value) if isinstance(value, dict) else value
        if weight not in (0, 0.0, None, False):
            found.append((name, weight))
    return found


def _begun(store: Store) -> str | None:
    """When and where, as the names of TensorBoard's event files say: events.out.tfevents.<seconds>.<host>."""
    names = [key.rpartition("/")[2].split(".") for key in store.keys(f"{TENSORBOARD}/")]
    known = sorted((int(parts[3]), parts[4]) for parts in names if len(parts) > 4 and parts[3].isdigit())
    if not known:
        return None
    seconds, host = known[0]
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))} UTC on {host}"


def loss_fragments(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses by term and by block."""
    drawn = [terms_figure(lines), _rate_figure(lines)]
    tables = []
    of_blocks = {"feature/": "attention output", "mlp/": "MLP output", "block/": "whole block", "stream/": "stream"}
    for prefix, words in of_blocks.items():
        found = block_curves(lines, prefix)
        if found is not None:
            several = len(found.step) > 1 and len(found.blocks) > 1  # the terms have the loss of a single block
            drawn.append(_block_figure(found, words) if several else None)
            rows = [
                (str(block), *map(number, _ends(values)))
                for block, values in zip(found.blocks, found.values, strict=True)
            ]
            tables.append(table(f"Loss of the {words} by block", ("block", "first", "lowest", "last"), rows))
    return [figures(drawn), _terms_table(lines), folded("Loss by block, numbers", *tables)]


def _terms(lines: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The terms that ever count; the total alone where it has only one."""
    found = []
    for name, words in TERMS.items():
        each = curve(lines, name)
        if each is not None and (each.high > 0).any():
            found.append(Line(words, each.step, each.mean, each.low, each.high))
    return found[:1] if len(found) == 2 else found


def terms_figure(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Every term of the loss by step; none of a single step, which the table has."""
    terms = _terms(lines)
    if not any(len(line.x) > 1 for line in terms):
        return None
    drawn = terms[: len(SERIES)]
    left_out = ", ".join(line.name for line in terms[len(SERIES) :])
    ends = "; ".join(f"{line.name} {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in drawn)
    return Figure(
        title="Loss by term and step",
        caption="Each term times its weight."
        + (f" In the table alone: {left_out}." if left_out else "")
        + (POOLED_STEPS if len(lines) > POINTS else ""),
        alt=f"Line chart of the loss by step, from the first to the last: {ends}.",
        svg=draw_lines(drawn, "step", "loss"),
    )


def _terms_table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, words in TERMS.items():
        _, values = series(lines, name)
        if len(values):
            rows.append((words, *map(number, (float(values[0]), float(values.min()), float(values[-1])))))
    return table("Terms of the loss", ("term", "first", "lowest", "last"), rows)


def _rate_figure(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the learning rate by step, unless it is the same in every step: the config has it then."""
    rate = curve(lines, "learning/current_learning_rate")
    if rate is None or rate.high.max() == rate.low.min():
        return None
    words = _schedule(rate)
    return Figure(
        title="Learning rate by step",
        caption=f"{words[:1].upper()}{words[1:]}.",
        alt=f"Line chart of the learning rate by step: {words}.",
        svg=draw_lines([Line("learning rate", rate.step, rate.mean)], "step", "learning rate", linear=True),
    )


def _schedule(rate: Curve) -> str:
    """`starts at 0.0003, peaks at 0.003 in step 11, ends at 3e-06`."""
    first, peak, last = float(rate.mean[0]), float(rate.high.max()), float(rate.mean[-1])
    inside = f"peaks at {peak:.3g} in step {rate.step[rate.high.argmax()]:,.0f}, " if peak > max(first, last) else ""
    return f"starts at {first:.3g}, {inside}ends at {last:.3g}"


def _block_figure(found: BlockCurves, words: str) -> Figure:
    finite = [values[np.isfinite(values)] for values in found.values]
    worst = found.blocks[int(np.argmax([each[-1] if len(each) else -np.inf for each in finite]))]
    kind, svg = block_picture(found, "loss", log=True)
    return Figure(
        title=f"Loss of the {words} by block",
        caption=f"Without the term's weight. At the last step it is highest in block {worst}.",
        alt=f"{kind} of the loss of the {words} by block and step; at the last step it is highest in block {worst}.",
        svg=svg,
    )


def _ends(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    known = values[np.isfinite(values)]
    return (float(known[0]), float(known.min()), float(known[-1])) if len(known) else (None, None, None)


def _rows(number: object) -> str:
    """The rows of a batch, as a run's config gives them."""
    return counted(number, "row") if isinstance(number, int) else f"{number} rows"


def speed_fragments(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Throughput, waiting and MFU of steps alone.

    A run that hardly waits has no figure of it. MFU has none: it is the throughput in another unit.
    """
    kinds = {
        "perf/tokens_per_second": ("Throughput", "tokens a second"),
        WAIT: ("Waiting for data", "% of a step"),
        MFU: ("Share of the peak FLOP/s (MFU)", "% of the peak"),
    }
    drawn, rows = [], []
    for name, (title, unit) in kinds.items():
        each, (_, values) = curve(_warm(lines), name), series(lines, name)
        if each is None:
            continue
        percent = unit.startswith("%")
        middle = float(np.median(values))
        words = f"median {middle:.2%}{unit[1:]}" if percent else f"median {middle:,.4g} {unit}"
        if len(each.step) > 1 and name != MFU and (name != WAIT or each.high.max() >= WAITING_DRAWN):
            line, y = Line(unit, each.step, each.mean, each.low, each.high), unit.replace("%", "share")
            svg = draw_lines([line], "step", y, linear=True, percent=percent, covers=[0])
            drawn.append(Figure(f"{title} by step", f"M{words[1:]}.", f"Line chart of {unit} by step, {words}.", svg))
        spread = (float(values.min()), middle, float(values.max()), float(values[-1]))
        cells = [Numeric(f"{value:.2%}") for value in spread] if percent else map(number, spread)
        rows.append((title if percent else unit, *cells))
    _, seconds = series(lines, "perf/step_time_seconds")
    if len(seconds):
        spread = (float(seconds.min()), float(np.median(seconds)), float(seconds.max()), float(seconds[-1]))
        rows.append(("seconds a step", *map(number, spread)))
    words = (
        "Time of steps only: evaluations and checkpoints between the steps are not counted. The charts leave out the "
        "first logged step, which includes compilation; the table includes it."
    )
    return [
        paragraph(words),
        figures(drawn),
        table("Speed in numbers", ("figure", "lowest", "median", "highest", "last"), rows),
    ]


def _warm(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Without the first line of a step, which compiled the program and would flatten the others."""
    timed = [line for line in lines if "perf/step_time_seconds" in line]
    return timed[1:] if len(timed) > 2 else timed
