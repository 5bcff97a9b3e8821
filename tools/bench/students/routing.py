"""Balancing of experts with and without an auxiliary loss: the same student, three times, from the same rows.

A tiny random Mixtral and a tiny random Qwen3-MoE learn the next bytes of real text (the demo's) in feature mode:
without balancing (`none`), with the auxiliary loss (`aux`), and by biases that follow the load (`aux_free`:
`moe_balance_type: noaux_tc` with its defaults). Seed, steps and batches are the same; no row is read twice, and of the
cache rows are all that is read.

    <family>_<way>_loss            held-out cross-entropy after the last step, nats a byte; `start`: before the first
    <family>_<way>_train_loss      the mean over the last tenth of the steps
    <family>_<way>_max_violation   max / mean - 1 of the experts' load on held-out rows, the mean over blocks
    <family>_aux_free_perplexity, _perplexity_without_bias   the second: for readers of an export without its biases
    <family>_aux_free_over_aux             losses
    <family>_aux_free_violation_over_none  violations

One run has one seed: differences of a few hundredths in loss are chance. `--plot` draws held-out loss and violation by
step.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.config import BenchConfig, BuildConfig, TapConfig, TapsConfig, TeacherConfig, TrainConfig
from distillcache.schemas.config.train import (
    FeatureLossConfig,
    LoadBalanceConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
)
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.runtime.child_python import python_environment, python_words
from distillcache.tools.bench.compiled import compiled_once
from distillcache.tools.bench.figures import Goal, Measured, plot_path, scratch_folder
from distillcache.tools.demo.command import sized_text
from distillcache.tools.pages.pictures import write_figure
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.train import train

EOS = "<|end|>"
SWITCH_WEIGHT = 0.01  # of the auxiliary loss, Switch Transformer's
WAYS: dict[str, tuple[float, Literal["noaux_tc"] | None]] = {  # loss.load_balance.weight, moe_balance_type
    "none": (0.0, None),
    "aux": (SWITCH_WEIGHT, None),
    "aux_free": (0.0, "noaux_tc"),
}
FAMILIES: dict[str, dict[str, Any]] = {"mixtral": {}, "qwen3_moe": {"qk_norm": "head"}}
LOSS_AT_MOST = 1.1
VIOLATION_AT_MOST = 0.999  # less than without balancing
# Of the picture.
FAMILY_TITLES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE"}
WAY_LINES = {
    "none": ("no balancing", "#444444"),
    "aux": ("auxiliary loss", "#c44e52"),
    "aux_free": ("aux-free", "#4c72b0"),
}


@dataclass(frozen=True)
class RoutingSizes:
    """The students' and the runs'. eval_every: steps between points of the picture."""

    blocks: int = 4
    hidden: int = 64
    experts: int = 8
    top_k: int = 2
    expert_size: int = 64
    row_tokens: int = 128
    rows: int = 3264  # what the steps read, once, and what is held out
    eval_rows: int = 64
    batch_rows: int = 8
    steps: int = 400
    eval_every: int = 50
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """Results of one run. evaluations: by step, with the start and the end."""

    evaluations: Sequence[Evaluation]
    train_loss: float

    @property
    def losses(self) -> list[float]:
        """Held-out, in nats."""
        return [math.log(found.perplexity) for found in self.evaluations if found.perplexity is not None]

    @property
    def violations(self) -> list[float]:
        return [found.max_violation for found in self.evaluations if found.max_violation is not None]


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench routing`."""
    plot = plot_path(config)
    with scratch_folder(config.dir) as folder, compiled_once(folder / "compiled"):
        found = train_all(folder, RoutingSizes())
    if plot is not None:
        write_plot(found, plot)
    return summarise(found)


def train_all(
    folder: Path, sizes: RoutingSizes, families: Sequence[str] = tuple(FAMILIES)
) -> dict[str, dict[str, Trained]]:
    """Family -> way -> result. Families but the first train in processes of their own, at the same time: steps this
    small leave a core idle, and nothing that is reported depends on time.
    """
    cache = build_rows(folder, sizes)
    students = {family: folder / family for family in families}
    for family, student in students.items():
        save_pretrained(Decoder(student_config(family, sizes), rngs=nnx.Rngs(sizes.seed)), student)
    configs = {
        family: [train_config(folder / f"{family}-{way}", cache, student, way, sizes) for way in WAYS]
        for family, student in students.items()
    }
    said = {family: [config.model_dump_json() for config in each] for family, each in configs.items()}
    beside = families[1:] if jax.default_backend() == "cpu" else ()  # an accelerator's memory is one process's
    with ExitStack() as stack:
        ends = [stack.enter_context(_training_beside(said[name], folder / f"compiled-{name}")) for name in beside]
        for family in families:
            for config in configs[family] if family not in beside else ():
                train(config)
                print(f"bench: {Path(config.run).name} is trained", file=sys.stderr)
        for wait in ends:
            wait()
    return {family: {way: _result(folder / f"{family}-{way}", sizes) for way in WAYS} for family in families}


SCRIPT = """
import sys
from pathlib import Path
from distillcache.schemas.config import TrainConfig
from distillcache.tools.bench.compiled import compiled_once
from distillcache.trainer.train import train
with compiled_once(Path(sys.argv[1])):
    for config in map(TrainConfig.model_validate_json, sys.stdin):
        train(config)
        print(f"bench: {Path(config.run).name} is trained", file=sys.stderr)
"""


@contextmanager
def _training_beside(configs: Sequence[str], compiled: Path) -> Iterator[Callable[[], None]]:
    """A process that runs these trainings; what is yielded waits for it. It is killed if this one fails meanwhile.

    Args:
        configs: as JSON.
    """
    command = python_words("-c", SCRIPT, str(compiled))
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=python_environment(), text=True)

    def wait() -> None:
        child.communicate("".join(f"{config}\n" for config in configs))
        if child.returncode:
            facts = {"exit code": child.returncode}
            raise DistillcacheError("a training of the bench failed", facts, "see its message above")

    thread = ThreadPoolExecutor(1)
    ended = thread.submit(wait)
    try:
        yield ended.result
    finally:
        child.kill()  # nothing happens where it has ended
        thread.shutdown()


def build_rows(folder: Path, sizes: RoutingSizes) -> str:
    """A cache of real text, one token a byte. Its teacher is random, for nothing but its rows is read."""
    teacher = folder / "teacher"
    dense = replace(student_config("mixtral", sizes), layers=_plan(sizes, moe=False), moe=None, family="llama")
    save_pretrained(Decoder(dense, rngs=nnx.Rngs(sizes.seed)), teacher)
    byte_tokenizer().save(str(teacher / "tokenizer.json"))
    (teacher / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    data = sized_text(folder, sizes.row_tokens, sizes.rows, sizes.eval_rows)
    build = BuildConfig(
        cache=str(folder / "cache"),
        teacher=TeacherConfig(path=str(teacher)),
        data=data,
        taps=TapsConfig(attn_out=TapConfig(codec="int4"), resid=None),  # a cache has one tap at least
        blocks=[0],
    )
    build_cache(build)
    return build.cache


def student_config(family: str, sizes: RoutingSizes) -> ModelConfig:
    """A student of this family, experts in every block."""
    heads = sizes.hidden // 16
    return ModelConfig(
        vocab_size=byte_tokenizer().get_vocab_size(),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.expert_size,
        num_heads=heads,
        num_kv_heads=max(1, heads // 2),
        head_dim=16,
        layers=_plan(sizes, moe=True),
        moe=MoeConfig(num_experts=sizes.experts, top_k=sizes.top_k, expert_size=sizes.expert_size),
        family=family,
        **FAMILIES[family],
    )


def _plan(sizes: RoutingSizes, *, moe: bool) -> tuple[LayerGroup, ...]:
    return (LayerGroup((BlockKind(moe=moe),), sizes.blocks),)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and one for the end of a document: needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def _result(run: Path, sizes: RoutingSizes) -> Trained:
    """Read the results of a finished run."""
    losses = [line["distill/hard_loss"] for line in read_metrics(run) if "distill/hard_loss" in line]
    return Trained(read_evaluations(run), statistics.fmean(losses[-max(1, sizes.steps // 10) :]))


def train_config(run: Path, cache: str, student: Path, way: str, sizes: RoutingSizes) -> TrainConfig:
    """The config with the next-token loss and the additions of this way."""
    weight, balance_type = WAYS[way]
    return TrainConfig(
        run=str(run),
        cache=cache,
        student=StudentConfig(init=str(student)),
        mode="feature",
        loss=LossConfig(
            alpha=0.0,
            feature=FeatureLossConfig(weight=0.0),
            load_balance=LoadBalanceConfig(weight=weight, scope="layer"),
        ),
        moe_balance_type=balance_type,
        optimizer=OptimizerConfig(learning_rate=sizes.learning_rate, warmup_steps=sizes.steps // 20),
        steps=sizes.steps,
        batch_rows=sizes.batch_rows,
        eval_every=sizes.eval_every,
        checkpoint_every=sizes.steps,
        seed=sizes.seed,
    )


def summarise(found: Mapping[str, Mapping[str, Trained]]) -> Measured:
    """Figures and goals of all runs."""
    figures: dict[str, float] = {}
    goals: list[Goal] = []
    for family, runs in found.items():
        none, aux, free = (runs[way] for way in WAYS)
        figures[f"{family}_start_loss"] = none.losses[0]
        figures[f"{family}_start_max_violation"] = none.violations[0]
        for way, run in runs.items():
            figures[f"{family}_{way}_loss"] = run.losses[-1]
            figures[f"{family}_{way}_train_loss"] = run.train_loss
            figures[f"{family}_{way}_max_violation"] = run.violations[-1]
        last = free.evaluations[-1]
        figures[f"{family}_aux_free_perplexity"] = math.exp(free.losses[-1])
        without = last.perplexity_without_bias or math.exp(free.losses[-1])
        figures[f"{family}_aux_free_perplexity_without_bias"] = without
        loss, violation = free.losses[-1] / aux.losses[-1], free.violations[-1] / none.violations[-1]
        goals.append(Goal(f"{family}_aux_free_over_aux", loss, LOSS_AT_MOST, "at_most"))
        goals.append(Goal(f"{family}_aux_free_violation_over_none", violation, VIOLATION_AT_MOST, "at_most"))
    return Measured(figures, goals)


def write_plot(found: Mapping[str, Mapping[str, Trained]], path: Path) -> None:
    """Held-out loss and violation by step, a line of panels for each family; .svg or .png, by the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, sharex=True, squeeze=False)
    for (family, runs), (losses, violations) in zip(found.items(), panels, strict=True):
        for way, run in runs.items():
            (label, color), steps = WAY_LINES[way], [each.step for each in run.evaluations]
            style: dict[str, Any] = {"label": label, "color": color, "marker": "o", "markersize": 3}
            losses.plot(steps[1:], run.losses[1:], **style)  # the first is three times as high
            violations.plot(steps, run.violations, **style)
        for panel, what in ((losses, "loss, nats a byte"), (violations, "max / mean - 1 of the load")):
            panel.set_title(FAMILY_TITLES[family])
            panel.set_ylabel(what)
            panel.grid(alpha=0.25)
        violations.set_ylim(bottom=0)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    panels[0, 0].legend()
    write_figure(figure, path)
