"""Two runs side by side: settings, curves and evaluations."""

import math
from typing import Any

from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.store import Store
from distillcache.tools.diff.flat import differences, flattened
from distillcache.trainer.run.evaluate import told_perplexity
from distillcache.trainer.run.folder import RESOLVED, read_evaluations, shown_config
from distillcache.trainer.run.metrics_log import read_metrics

CURVE_POINTS = 8  # of a curve in the report, evenly drawn over the common steps
FREE = ("run", "storage", "checkpoint_every", "keep_checkpoints", "log_every")


def compare_runs(a: str, b: str) -> dict[str, Any]:
    """Compare two runs; returns differences as plain values."""
    configs = differences(_config(a), _config(b), FREE)
    curves = _curves(read_metrics(a), read_metrics(b))
    evaluations = _evaluations(a, b)
    found = {"config": configs, "curves": curves, "evaluations": evaluations}
    return {"kind": "runs", "a": a, "b": b, "summary": _summary(found), **found}


def _config(run: str) -> dict[str, Any]:
    store = Store(run)
    config = shown_config(store)[1]
    if not config:
        raise InputError("the run's config is missing", {"file": store.where(RESOLVED)}, "name another run")
    return flattened(config)


def _curves(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare every metric that both runs have at some step: values at some common steps, the last, and the widest
    difference.
    """
    found: dict[str, Any] = {}
    for name in [name for name in _names(a) if name in _names(b) and name != "step"]:
        one, other = _by_step(a, name), _by_step(b, name)
        steps = sorted(one.keys() & other.keys())
        if not steps:
            continue
        widest = max(steps, key=lambda step: abs(one[step] - other[step]))
        drawn = sorted({steps[round(at * (len(steps) - 1) / (CURVE_POINTS - 1))] for at in range(CURVE_POINTS)})
        found[name] = {
            "steps": drawn,
            "a": [one[step] for step in drawn],
            "b": [other[step] for step in drawn],
            "widest": {"step": widest, "a": one[widest], "b": other[widest]},
            "same": all(one[step] == other[step] for step in steps),
        }
    return found


def _names(lines: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _by_step(lines: list[dict[str, Any]], name: str) -> dict[int, float]:
    """A run's values of a metric; those that are no numbers say nothing."""
    values = {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float)}
    return {step: float(value) for step, value in values.items() if math.isfinite(value)}


def _evaluations(a: str, b: str) -> list[dict[str, Any]]:
    one, other = ({entry.step: entry for entry in read_evaluations(run)} for run in (a, b))
    return [
        {
            "step": step,
            "perplexity": [one[step].perplexity, other[step].perplexity],
            "cosine": [one[step].mean_cosine, other[step].mean_cosine],
        }
        for step in sorted(one.keys() & other.keys())
    ]


def _summary(found: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {as_yaml(a)} and {as_yaml(b)}" for name, (a, b) in list(found["config"].items())[:6]]
    other = [name for name, curve in found["curves"].items() if not curve["same"] and "/" in name]
    if found["curves"] and not other:
        lines.append("all curves are the same")
    for name in [name for name in other if name in ("distill/total_loss", "distill/student_perplexity")]:
        curve = found["curves"][name]
        lines.append(f"{name} at step {curve['steps'][-1]}: {curve['a'][-1]:.4g} and {curve['b'][-1]:.4g}")
    if found["evaluations"]:
        last = found["evaluations"][-1]
        a, b = (told_perplexity(value, ".4g") for value in last["perplexity"])
        lines.append(f"perplexity at step {last['step']}: {a} and {b}")
    return lines or ["no difference found"]
