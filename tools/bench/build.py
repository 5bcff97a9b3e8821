"""Building: tokens a second of the build divided by those of the bare teacher, interleaved in one run.

What else a machine does changes from minute to minute: so the bare teacher runs before and after every build, and a
ratio is to the mean of its two neighbours.

SmolLM2-135M, batches of 2 rows of 256 tokens of real text, each a shard. The bare teacher is its jitted forward with
logits, which the build does not compute; the build records `attn_out` and `resid` of all blocks. Its rate is that of a
long build, from one durable shard to the next: the clock runs from the commit of the first shard to that of the last,
so compiling is left out, and a shard's encoding, digests and writes have the teacher's next batch to hide behind, as
they have in a build of many shards. `<codec>_delta`: `resid` as differences from block to block. `hybrid_...`: the same
of a random hybrid model, three blocks with the gated delta rule to one with attention, of about as many parameters.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from distillcache.cache_builder.build import SEGMENT
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.record.loop import Work, record_batches
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.plan import make_plan
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.describe import describe_rows, describe_teacher
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.config import BenchConfig, BuildConfig, PrepareConfig, TapsConfig, TeacherConfig
from distillcache.schemas.format.rows import Row, RowReader
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.steps.mixers import HYBRID
from distillcache.tools.demo.command import sized_text
from distillcache.tools.demo.teacher import fetch_teacher

ROUNDS = 2  # a round takes a minute: the teacher runs once for every choice
EIGHT_BLOCKS = replace(HYBRID, layers=(replace(HYBRID.layers[0], repeats=2),), tie_embeddings=True)
MAX_IN_FLIGHT = 2048 << 20  # the build's own default


@dataclass(frozen=True)
class BuildSizes:
    """Sizes of the build. batches: of a build, two at least. forwards: batches of the bare teacher at a time.
    choices: name -> (codec, whether `resid` is delta-coded). hybrid: the other model, but for its vocabulary; its
    choices: the names of those that it is built with.
    """

    batch_rows: int = 2
    row_tokens: int = 256
    batches: int = 5
    forwards: int = 3
    choices: Mapping[str, tuple[str, bool]] = field(
        default_factory=lambda: {
            "bf16": ("bf16", False),
            "int8": ("int8", False),
            "int8_delta": ("int8", True),
            "int4": ("int4", False),
            "int4_delta": ("int4", True),
        }
    )
    hybrid: ModelConfig = EIGHT_BLOCKS
    hybrid_choices: Sequence[str] = ("int8_delta",)


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench build`."""
    with scratch_folder(config.dir) as folder:
        return measure_build(folder, str(fetch_teacher()), BuildSizes(), config.rounds or ROUNDS)


def measure_build(folder: Path, teacher: str, sizes: BuildSizes, rounds: int) -> Measured:
    """Measure with another teacher and other sizes."""
    rows = reference_rows(folder, teacher, sizes.row_tokens, sizes.batch_rows * sizes.batches)
    dense = load_pretrained(teacher)
    hybrid = Decoder(
        replace(sizes.hybrid, vocab_size=dense.config.vocab_size), dtype=str(dense.dtype), rngs=nnx.Rngs(0)
    )
    some = {name: sizes.choices[name] for name in sizes.hybrid_choices}
    figures: dict[str, float] = {}
    goals: list[Goal] = []
    for prefix, decoder, choices in (("", dense, sizes.choices), ("hybrid_", hybrid, some)):
        rates, ratios = _compare(folder / "cache", teacher, decoder, rows, replace(sizes, choices=choices), rounds)
        figures |= {f"{prefix}{name}_tokens_per_s": rate for name, rate in rates.items()}
        least = {name: 1.0 if name in ("bf16", "int8") else 0.9 for name in ratios}
        goals += [Goal(f"{prefix}{name}_over_forward", ratios[name], least[name], "at_least") for name in ratios]
    return Measured(figures, goals)


def _compare(
    cache: Path, teacher: str, decoder: Decoder, rows: RowReader, sizes: BuildSizes, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """`between_forwards` of one model, of which the plans say that it is `teacher`."""
    decoder = with_attention(decoder, chosen_kernel("auto", decoder.config, str(decoder.dtype)))  # a build's own
    batches = [(first, rows.slice(first, first + sizes.batch_rows)) for first in range(0, len(rows), sizes.batch_rows)]
    builds = {
        name: partial(_build_rate, cache, teacher, decoder, rows, batches, codec, delta)
        for name, (codec, delta) in sizes.choices.items()
    }
    return between_forwards(_forward_path(decoder, batches[: sizes.forwards]), builds, rounds)


def between_forwards(
    forward: Callable[[], float], builds: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(median rates of all, median ratios of the builds to the mean of the forwards before and after)."""
    rates: dict[str, list[float]] = {name: [] for name in ("forward", *builds)}
    ratios: dict[str, list[float]] = {name: [] for name in builds}
    before = forward()
    print("bench: the bare teacher ran once", file=sys.stderr)
    for number in range(rounds):
        for name, build in builds.items():
            rate, after = build(), forward()
            rates[name].append(rate)
            rates["forward"].append(after)
            ratios[name].append(2 * rate / (before + after))
            before = after
            print(f"bench: round {number + 1} of {rounds}, {name} {ratios[name][-1]:.3f}", file=sys.stderr)
    return ({k: statistics.median(v) for k, v in rates.items()}, {k: statistics.median(v) for k, v in ratios.items()})


def reference_rows(folder: Path, teacher: str, row_tokens: int, rows: int) -> RowReader:
    """A number of rows of real English text, in the teacher's tokens."""
    data = sized_text(folder, row_tokens, rows)
    prepare_rows(PrepareConfig(out=str(folder / "rows"), data=data), tokenizer=load_tokenizer(teacher))
    return RowReader(Store(str(folder / "rows")))


def _forward_path(decoder: Decoder, batches: Sequence[tuple[int, list[Row]]]) -> Callable[[], float]:
    """A function that runs the bare teacher over all batches and returns tokens a second."""
    graph, parameters = nnx.split(decoder)

    @jax.jit
    def forward(
        parameters: nnx.State, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array | None:
        return nnx.merge(graph, parameters)(tokens, positions, segment_ids).logits

    def arrays(rows: list[Row]) -> list[jax.Array]:
        return [jnp.asarray([getattr(row, name) for row in rows]) for name in ("tokens", "positions", "segment_ids")]

    inputs = [arrays(rows) for _, rows in batches]
    jax.block_until_ready(forward(parameters, *inputs[0]))

    def rate() -> float:
        start = time.perf_counter()
        for each in inputs:
            jax.block_until_ready(forward(parameters, *each))
        return sum(each[0].size for each in inputs) / (time.perf_counter() - start)

    return rate


def _build_rate(
    folder: Path,
    teacher: str,
    decoder: Decoder,
    rows: RowReader,
    batches: Sequence[tuple[int, list[Row]]],
    codec: str,
    delta: bool,
) -> float:
    """Tokens a second of the build's own loop, with real writes into a folder that is removed afterwards."""
    taps = {"attn_out": {"codec": codec}, "resid": {"codec": codec, "delta": delta}}
    batch_rows = len(batches[0][1])
    config = BuildConfig(
        cache=str(folder),
        teacher=TeacherConfig(path=teacher),
        data=rows.index.data,
        taps=TapsConfig.model_validate(taps),
        batch_rows=batch_rows,
        shard_rows=batch_rows,
    )
    model = decoder.config
    described = describe_teacher(teacher, model, digest="0")
    plan = make_plan(config, SEGMENT, model, described, describe_rows(rows), str(decoder.dtype))
    store, commits = Store(str(folder)), Commits()
    writer = ShardWriter(store, plan, max_bytes=MAX_IN_FLIGHT, numerics=None, on_commit=commits.add)
    with Progress("bench", len(rows) * plan.rows.row_tokens, unit="tokens", quiet=True) as bar:
        work = Work(store=store, plan=plan, rows=rows, stop=StopRequest(), decoder=decoder)
        record_batches(work, iter(batches), writer, bar)
    shutil.rmtree(folder)
    return commits.rate(batch_rows * plan.rows.row_tokens)


class Commits:
    """When shards became durable."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def add(self, shard: int) -> None:
        self._times.append(time.perf_counter())

    def rate(self, tokens: int) -> float:
        """Tokens a second between the first and the last; tokens: of a shard."""
        return tokens * (len(self._times) - 1) / (self._times[-1] - self._times[0])
