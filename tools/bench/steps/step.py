"""Training: a step from a cache against the same step with the teacher in the loop, and what a step needs of memory.

SmolLM2-135M, the demo's cut student, batches of 2 rows of 256 tokens of real text, a bf16 cache on the local disk; the
memory is that of batches of 8 rows of 512. A round runs every path once, so that other work on the machine meets all of
them; ratios are taken in each round, and the median over rounds counts.

    wait_share             of the steps from the cache: waiting for a batch, in all
    speedup_of_ideal       (online step / offline step) / ((teacher's forward + student's step) / student's step)
    blockwise_over_feature the blockwise step against that of feature mode, which runs the whole student
    temporaries_48_over_12 what XLA allocates for a step beside its arguments: for a student of 48 blocks, and of 12
    gated_delta_over_attention    output and gradients of a hybrid's recurrent mixer over those of its attention
    mamba2_over_attention         the same of Mamba-2
    hybrid_compile_many_over_few  compiling a hybrid of 48 blocks over compiling one of 8

*offline*, *online*: fed as `train` feeds them, batches being read, or computed, while the student steps. *student*,
*teacher*: alone, on a batch that lies on the device. Steps of feature mode have their batches there too.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.head import OutputHead
from distillcache.models.surgery import apply_surgery
from distillcache.schemas.codecs import make_signs
from distillcache.schemas.config import BenchConfig, TapConfig, TrainConfig
from distillcache.schemas.format.manifest import TapPlan
from distillcache.schemas.format.tap_codec import tap_codec
from distillcache.schemas.format.tap_plan import tap_plan
from distillcache.tools.bench.compiled import compiled_once
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.steps.head_kl import HeadSizes, measure_head_kl
from distillcache.tools.bench.steps.mixers import MixerSizes, measure_mixers
from distillcache.tools.demo.command import build_config, default_surgery, sized_text, train_config
from distillcache.tools.demo.teacher import fetch_teacher
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from distillcache.trainer.feed.online import OnlineSource
from distillcache.trainer.feed.source import Source
from distillcache.trainer.feed.teacher import open_teacher
from distillcache.trainer.mesh.placement import to_host
from distillcache.trainer.run.stage import OpenSource, StageRun, plan_stage
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.parameters import Parameters, all_parameters, reached_by
from distillcache.trainer.step.program import Setting, init_state, jit_step
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import TapReading, Targets, block_targets, is_in_step, student_spans

ROUNDS = 2  # a round takes half a minute
WAIT_SHARE_AT_MOST = 0.02
OF_IDEAL_AT_LEAST = 0.9
OVER_FEATURE_AT_MOST = 1.05
GROWTH_AT_MOST = 1.25
FEATURE_CODEC = ("bf16", False)
Slots = Mapping[str, Sequence[int]] | None
# Of a fed path: the pipeline fills up while the first step runs, which therefore does not count.
WARM_STEPS = 1


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the steps that run and compile.

    rows: of the cache. steps: of a path that count in a round; in feature mode one.
    memory_batch: rows and tokens of the steps that are compiled and never run. depths: blocks, few and many. heads: of
    the KL over the whole vocabulary. mixers: of a hybrid model. codecs: name -> (codec of both taps, whether `resid`
    is delta-coded).
    """

    batch_rows: int = 2
    row_tokens: int = 256
    rows: int = 8
    steps: int = 2
    memory_batch: tuple[int, int] = (8, 512)
    depths: tuple[int, int] = (12, 48)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    heads: HeadSizes = field(default_factory=HeadSizes)
    mixers: MixerSizes = field(default_factory=MixerSizes)
    codecs: Mapping[str, tuple[str, bool]] = field(default_factory=lambda: {"int8_delta": ("int8", True)})


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench step`."""
    with scratch_folder(config.dir) as folder, compiled_once(folder / "compiled"):
        return measure_step(folder, str(fetch_teacher()), StepSizes(), config.rounds or ROUNDS)


def measure_step(folder: Path, teacher: str, sizes: StepSizes, rounds: int) -> Measured:
    """Measure with another teacher and other sizes."""
    decoder = load_pretrained(teacher, dtype="float32")
    student = apply_surgery(decoder, [default_surgery(decoder.config)])
    del decoder
    heads = measure_head_kl(sizes.heads, rounds)
    mixers = measure_mixers(sizes.mixers, rounds)
    rows, tokens = sizes.memory_batch
    memory = measure_memory(student.config, replace(sizes, batch_rows=rows, row_tokens=tokens))
    times = measure_times(folder, teacher, student, sizes, rounds)
    found = (times, memory, heads, mixers)
    return Measured(
        {name: figure for each in found for name, figure in each.figures.items()},
        [goal for each in found for goal in each.goals],
    )


# Times.


def measure_times(folder: Path, teacher: str, student: Decoder, sizes: StepSizes, rounds: int) -> Measured:
    """Seconds of a step on every path, and their ratios."""
    cache = _build(folder, teacher, sizes)
    paths = _Paths(cache, student, sizes)
    found: list[dict[str, float]] = []
    for number in range(rounds):
        found.append({})
        for name, path in paths.of_round(number).items():
            found[-1][name] = path()
            print(f"bench: round {number + 1} of {rounds}, {name} {found[-1][name]:.3g} s", file=sys.stderr)
    measured = summarise(found, paths.waits, sizes.batch_rows * sizes.row_tokens)
    compiled = {f"{name}_first_step_s": seconds for name, seconds in paths.first_s.items()}
    return Measured({**measured.figures, **compiled}, measured.goals)


def summarise(rounds: Sequence[Mapping[str, float]], waits: Sequence[tuple[float, float]], tokens: int) -> Measured:
    """Figures and goals of the times.

    Args:
        rounds: seconds of a step on every path in each round; of feature mode in the first one at least.
        waits: (seconds of waiting for a batch, seconds) of every step from the cache.
        tokens: in a batch.
    """

    def median(ratio: Callable[[Mapping[str, float]], float], rounds: Sequence[Mapping[str, float]] = rounds) -> float:
        return statistics.median(ratio(seconds) for seconds in rounds)

    figures = {
        f"{name}_s": statistics.median(seconds[name] for seconds in rounds if name in seconds) for name in rounds[0]
    }
    figures["blockwise_tokens_per_s"] = median(lambda s: tokens / s["offline"])
    figures["speedup"] = median(lambda s: s["online"] / s["offline"])
    figures["speedup_ideal"] = median(lambda s: 1 + s["teacher"] / s["student"])
    figures["offline_over_student"] = median(lambda s: s["offline"] / s["student"])
    figures["online_over_teacher_and_student"] = median(lambda s: s["online"] / (s["teacher"] + s["student"]))
    figures["two_micro_batches_over_one"] = median(lambda s: s["student_two_micro_batches"] / s["student"])
    with_feature = [seconds for seconds in rounds if "feature" in seconds]
    figures["blockwise_over_feature_no_remat"] = median(lambda s: s["student"] / s["feature_no_remat"], with_feature)
    of_ideal = median(lambda s: s["online"] / s["offline"] / (1 + s["teacher"] / s["student"]))
    over_feature = median(lambda s: s["student"] / s["feature"], with_feature)
    waited, stepped = (sum(seconds) for seconds in zip(*waits, strict=True))
    goals = [
        Goal("wait_share", waited / stepped, WAIT_SHARE_AT_MOST, "at_most"),
        Goal("speedup_of_ideal", of_ideal, OF_IDEAL_AT_LEAST, "at_least"),
        Goal("blockwise_over_feature", over_feature, OVER_FEATURE_AT_MOST, "at_most"),
    ]
    return Measured(figures, goals)


def _build(folder: Path, teacher: str, sizes: StepSizes) -> str:
    """A bf16 cache of both taps, without held-out rows."""
    data = sized_text(folder, sizes.row_tokens, sizes.rows)
    build = build_config(folder / "cache", teacher, data, sizes.batch_rows)
    build_cache(build)
    return build.cache


class _Paths:
    """Everything that a round times. waits: see `summarise`. first_s: of a first step."""

    def __init__(self, cache: str, student: Decoder, sizes: StepSizes) -> None:
        self._cache, self._student, self._sizes = cache, student, sizes
        self._teacher = open_teacher(cache)
        self.waits: list[tuple[float, float]] = []
        self.first_s: dict[str, float] = {}
        self._offline, self._online = self._run(self._cached), self._run(self._computed)
        halves = self._run(self._cached, micro_batches=2)
        self._every: dict[str, Callable[[], float]] = {
            "offline": lambda: self._fed(self._offline, self.waits),
            "student": self._alone_path("student", self._offline, sizes.steps),
            "teacher": self._teacher_path(),
            "online": lambda: self._fed(self._online, []),
            "student_two_micro_batches": self._alone_path("student_two_micro_batches", halves, sizes.steps),
        }

    def of_round(self, number: int) -> dict[str, Callable[[], float]]:
        """Name -> function that runs some steps and returns the seconds of one."""
        return self._every | (self._in_feature_mode() if number == 0 else {})

    def _in_feature_mode(self) -> dict[str, Callable[[], float]]:
        """Steps of the whole student: in one round only, for they take the longest and are far from their goal."""
        parts = min(4, self._sizes.batch_rows)  # without recomputing, a whole batch of 8 x 512 would take 12 GB
        no_remat = {"mode": "feature", "remat": "none", "micro_batches": parts}
        return {
            "feature": lambda: self._alone_path("feature", self._run(self._cached, mode="feature"), 1)(),
            "feature_no_remat": lambda: self._alone_path("feature_no_remat", self._run(self._cached, **no_remat), 1)(),
        }

    def _run(self, source: OpenSource, **changes: Any) -> StageRun:
        """A stage with a state of its own: steps give the memory of their state away."""
        base = train_config(Path("none"), self._cache, [], 1000, self._sizes.batch_rows)
        config = base.model_copy(update=changes)
        parameters = all_parameters(self._student)
        [stage] = resolve_stages(config, config.mesh)
        plan = plan_stage(config, config.mesh, stage, self._student, parameters, _Given(source))
        return StageRun(plan, parameters)

    def _cached(self, taps: Sequence[str], blocks: Sequence[int] | None, slots: Slots = None) -> Source:
        return CacheSource(self._cache, taps, blocks, "train", leaving=False, slots=slots)

    def _computed(self, taps: Sequence[str], blocks: Sequence[int] | None, slots: Slots = None) -> Source:
        return OnlineSource(self._teacher, taps, blocks, "train", leaving=False, slots=slots)

    def _fed(self, run: StageRun, waits: list[tuple[float, float]]) -> float:
        """Seconds of a step that is fed as `train` feeds it: the next batch is taken while the step is computed."""
        seconds = []
        with make_feed(run.plan.source, global_batch_rows=self._sizes.batch_rows, seed=0) as feed:
            batch = run.plan.place(next(feed))
            for number in range(WARM_STEPS + self._sizes.steps):
                start, waited = time.perf_counter(), feed.wait_s
                sums = run.advance(batch)
                batch = run.plan.place(next(feed))
                run.losses(to_host(sums))  # waits until they are computed
                if number >= WARM_STEPS:
                    seconds.append(time.perf_counter() - start)
                    waits.append((feed.wait_s - waited, seconds[-1]))
        return statistics.median(seconds)

    def _alone_path(self, name: str, run: StageRun, steps: int) -> Callable[[], float]:
        """Steps on one batch that lies on the device; the first one, here, compiles."""
        batch = run.plan.place(run.plan.source[range(self._sizes.batch_rows)])
        self.first_s[name] = _timed(lambda: run.losses(to_host(run.advance(batch))), 1)
        return lambda: _timed(lambda: run.losses(to_host(run.advance(batch))), steps)

    def _teacher_path(self) -> Callable[[], float]:
        """The recorder as both `build` and the online step run it."""
        source = self._computed((), None)
        recorder = self._teacher.recorder(source.segments()[0])
        batch = source[range(self._sizes.batch_rows)]
        inputs = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]

        def forward() -> None:
            jax.block_until_ready(recorder.record(recorder.parameters, *inputs))

        forward()
        return lambda: _timed(forward, self._sizes.steps)


def _timed(work: Callable[[], Any], times: int) -> float:
    """The median of the seconds that it takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@dataclass(frozen=True)
class _Given:
    """Taps of a teacher, and nothing else of it."""

    open: OpenSource

    def norms(self) -> np.ndarray:
        raise NotImplementedError("for inject: attn_in alone")

    def head(self) -> OutputHead:
        raise NotImplementedError("for a KL to the teacher's head alone")


# Memory.


def measure_memory(config: ModelConfig, sizes: StepSizes) -> Measured:
    """Return the temporaries that XLA plans to allocate for a step besides its arguments. Steps are compiled and never
    run.

    Args:
        config: of the student, whose depth is left aside.
    """
    figures: dict[str, float] = {}
    goals: list[Goal] = []
    few, many = sizes.depths
    growth_name = f"temporaries_{many}_over_{few}"
    for dtype in sizes.dtypes:
        found = {
            f"{codec}_{place}": _both_depths(config, sizes, dtype, sizes.codecs[codec], inside_scan=inside)
            for codec in sizes.codecs
            for place, inside in (("inside", True), ("after", False))
        }
        found["feature_mode"] = _both_depths(config, sizes, dtype, FEATURE_CODEC, mode="feature")
        for name, (at_few, at_many) in found.items():
            figures[f"temporaries_{dtype}_{name}_mb"] = at_many / 1e6
            figures[f"{growth_name}_{dtype}_{name}"] = at_many / at_few
        worst = max(at_many / at_few for name, (at_few, at_many) in found.items() if name != "feature_mode")
        goals.append(Goal(f"{growth_name}_{dtype}", worst, GROWTH_AT_MOST, "at_most"))
    return Measured(figures, goals)


def _both_depths(
    config: ModelConfig, sizes: StepSizes, dtype: str, codec: tuple[str, bool], **options: Any
) -> tuple[int, int]:
    """`temporaries` of few and of many blocks, compiled side by side."""

    def at(depth: int) -> int:
        return temporaries(abstract_student(config, depth), sizes, dtype, codec, **options)

    with ThreadPoolExecutor(2) as pool:
        few, many = pool.map(at, sizes.depths)
    print(f"bench: {dtype}, {codec[0]}, {options}: {few / 1e6:.5g} and {many / 1e6:.5g} MB", file=sys.stderr)
    return few, many


@dataclass(frozen=True)
class AbstractStudent:
    """A student of shapes without values, so that it takes no memory, whatever its size."""

    decoder: Decoder
    parameters: Parameters


def abstract_student(config: ModelConfig, depth: int) -> AbstractStudent:
    """A student of these sizes with a number of blocks, all of the first one's kind."""
    deep = replace(config, layers=(LayerGroup(config.layers[0].pattern[:1], depth),))
    decoder = nnx.eval_shape(lambda: Decoder(deep))
    return AbstractStudent(decoder, jax.eval_shape(lambda: all_parameters(Decoder(deep))))


def temporaries(
    student: AbstractStudent,
    sizes: StepSizes,
    dtype: str,
    codec: tuple[str, bool],
    *,
    mode: str = "blockwise",
    inside_scan: bool = True,
) -> int:
    """Bytes of a step's temporaries, on a cache of both taps in this codec.

    Where blockwise updates follow the scan, without the stacked gradients: those have the size of what is trained and
    must exist.
    """
    given = {"mode": mode, "compute_dtype": dtype, "optimizer": {"inside_scan": inside_scan}}
    config = TrainConfig.model_validate({"run": "none", "cache": "none", **given})
    [stage] = resolve_stages(config, config.mesh)
    stack, graph = StudentStack(student.decoder), nnx.graphdef(student.decoder)
    recorded = frozenset(("resid", "attn_out"))
    setting = Setting(
        config, stage.loss, stage.optimizer, stage.steps, stage.name, stack, graph, None, config.cache, recorded
    )
    program = stage.program(setting)
    taps = _taps(program.taps, stack.config, codec)
    reading, targets = _reading(taps, stack.config)
    reached = reached_by(program.rules(), student.parameters)
    trained = {name: student.parameters[name] for name in reached}
    state = jax.eval_shape(lambda values: init_state(stack, values, program.optimizer), trained)
    compiled = (
        jit_step(program.update(reading), state, None).lower(state, {}, _abstract_batch(taps, sizes), targets).compile()
    )
    stacked = 0 if inside_scan else sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
    return compiled.memory_analysis().temp_size_in_bytes - stacked


def _taps(names: Sequence[str], config: ModelConfig, codec: tuple[str, bool]) -> dict[str, TapPlan]:
    """Taps of every block, as the trainer reads them: without the stream that leaves the last one."""
    kind, delta = codec
    return {
        name: tap_plan(
            name,
            TapConfig.model_validate({"codec": kind, "delta": delta and name == "resid"}),
            range(config.num_blocks),
            config.hidden_size,
        )
        for name in names
    }


def _reading(taps: Mapping[str, TapPlan], config: ModelConfig) -> tuple[TapReading, Targets]:
    """Describe the reading of these taps if block i's lie at position i and all blocks are trained."""
    blocks, hidden = range(config.num_blocks), config.hidden_size
    codecs = {name: tap_codec(tap, {f"signs.{name}": make_signs(name, hidden)}) for name, tap in taps.items()}
    places = {name: {block: block for block in blocks} for name in taps}
    spans = student_spans(config, config.num_blocks, None)
    targets = block_targets(config, spans, [places] * len(spans), dict.fromkeys(blocks, 1.0))
    return TapReading(codecs, hidden, in_step=is_in_step(spans, places, list(blocks))), targets


def _abstract_batch(taps: Mapping[str, TapPlan], sizes: StepSizes) -> dict[str, Any]:
    shape, whole = (sizes.batch_rows, sizes.row_tokens), jnp.int32
    kinds = {"positions": whole, "segment_ids": whole, "tokens": whole, "loss_mask": jnp.bool_}
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    for name, tap in taps.items():
        batch[name] = {
            part.part: jax.ShapeDtypeStruct((part.slots, *shape, part.width), jnp.dtype(part.dtype))
            for part in tap.parts
        }
    return batch
