"""`distillcache bench accelerator`: all that is worth knowing of a new accelerator, in less than ten minutes.

    distillcache bench accelerator --json

One part after the other, the ones that answer most for their time first; figures are named `<part>.<figure>`:

    kernels  attention and experts, each way against the plainest (kernels.py)
    memory   a random teacher of a billion parameters: its recorder, and a student's step (memory.py)
    parity   logits against transformers', where torch is installed (parity.py)
    codec    speed of encoding and decoding
    feed, build, step   those benches in small, with the random teacher, so that nothing is fetched
    <part>.seconds      what it took, compiling included

A part that fails, or for which no time is left, does not stop the others: `left_out` says why, and the goal
`parts_failed` counts the first. Without an accelerator everything runs in tiny sizes: that says that it runs, no more.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

from distillcache.models.checkpoint import save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.schemas.config import BenchConfig
from distillcache.tools.bench.accelerator.kernels import KernelSizes, measure_attention, measure_experts
from distillcache.tools.bench.accelerator.memory import MemorySizes, measure_memory, peak_gb, random_teacher
from distillcache.tools.bench.accelerator.parity import measure_parity, missing
from distillcache.tools.bench.build import BuildSizes, measure_build
from distillcache.tools.bench.codec import CHOICES, measure_speed
from distillcache.tools.bench.compiled import compiled_once
from distillcache.tools.bench.feed import FeedSizes, measure_feed
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.steps.head_kl import HeadSizes
from distillcache.tools.bench.steps.mixers import TINY_MIXERS
from distillcache.tools.bench.steps.step import StepSizes, measure_step
from distillcache.tools.bench.students.routing import EOS, byte_tokenizer

TIME_S = 480  # after which no further part begins: the last one may take two minutes
Part = Callable[[Path], Measured]


@dataclass(frozen=True)
class AcceleratorSizes:
    """Sizes of all parts. codec: shape of what is encoded, `[S, B, T, D]`. rounds: of build, step and feed."""

    kernels: KernelSizes = field(default_factory=KernelSizes)
    memory: MemorySizes = field(default_factory=MemorySizes)
    build: BuildSizes = field(default_factory=lambda: BuildSizes(batch_rows=8, row_tokens=512, batches=5, forwards=5))
    step: StepSizes = field(default_factory=lambda: StepSizes(batch_rows=8, row_tokens=512, dtypes=("bfloat16",)))
    feed: FeedSizes = field(default_factory=FeedSizes)
    codec: tuple[int, int, int, int] = (8, 8, 1024, 2048)
    rounds: int = 2


TINY_TEACHER = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 3),),
    tie_embeddings=True,
)
TINY = AcceleratorSizes(
    kernels=KernelSizes(2, 32, 2, heads=4, kv_heads=2, head_dim=8, experts=4, top_k=2, hidden=16, expert_size=8),
    memory=MemorySizes(TINY_TEACHER, rows=2, tokens=16),
    build=BuildSizes(2, 16, batches=3, forwards=1, choices={"bf16": ("bf16", False), "int8_delta": ("int8", True)}),
    step=StepSizes(
        batch_rows=2,
        row_tokens=16,
        rows=4,
        steps=1,
        memory_batch=(2, 16),
        depths=(2, 3),
        dtypes=("bfloat16",),
        heads=HeadSizes(vocab=4099, hidden=16, memory_tokens=256, timed_tokens=64),
        mixers=TINY_MIXERS,
        codecs={"bf16": ("bf16", False)},
    ),
    feed=FeedSizes((5, 16, 64), rows=12, distinct=6, batch_rows=2, batches=5, shard_rows=2, tf_rows=2, million=1000),
    codec=(8, 1, 16, 64),
    rounds=1,
)


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench accelerator`."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        print("bench: no accelerator here: all runs in tiny sizes, and speeds mean nothing", file=sys.stderr)
    sizes = TINY if on_cpu else AcceleratorSizes()
    with scratch_folder(config.dir) as folder, compiled_once(folder / "compiled"):
        return run_parts(make_parts(replace(sizes, rounds=config.rounds or sizes.rounds)), folder)


def run_parts(parts: dict[str, Part], folder: Path, time_s: float = TIME_S) -> Measured:
    """The figures of all parts that could run."""
    figures: dict[str, float] = {}
    goals: list[Goal] = []
    left_out: dict[str, str] = {}
    failed, begun = 0, time.monotonic()
    for name, part in parts.items():
        start = time.monotonic()
        if start - begun > time_s:
            left_out[name] = f"no time left after {start - begun:.0f} s"
            continue
        print(f"bench: {name}", file=sys.stderr)
        own = folder / name
        own.mkdir()
        try:
            found = part(own)
        except Exception as error:  # whatever a new device's libraries raise: the other parts are wanted all the more
            failed += 1
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            traceback.print_exc()
            continue
        figures |= {f"{name}.{figure}": value for figure, value in found.figures.items()}
        figures[f"{name}.seconds"] = time.monotonic() - start
        goals += [replace(goal, name=f"{name}.{goal.name}") for goal in found.goals]
        left_out |= found.details.get("left_out", {})
    goals.append(Goal("parts_failed", failed, 0, "at_most"))
    return Measured(figures, goals, details={"left_out": left_out} if left_out else {})


def make_parts(sizes: AcceleratorSizes) -> dict[str, Part]:
    """Name -> what measures it in an empty folder of its own."""
    return {
        "kernels": lambda folder: _kernels(sizes),
        "memory": lambda folder: Measured(measure_memory(random_teacher(sizes.memory), sizes.memory), []),
        "parity": _parity,
        "codec": lambda folder: _codec(sizes),
        "feed": lambda folder: measure_feed(folder, sizes.feed, sizes.rounds),
        "build": lambda folder: measure_build(folder, write_teacher(folder, sizes), sizes.build, sizes.rounds),
        "step": lambda folder: _step(folder, sizes),  # last: it compiles the most
    }


def _kernels(sizes: AcceleratorSizes) -> Measured:
    return Measured(measure_attention(sizes.kernels) | measure_experts(sizes.kernels), [])


def _parity(folder: Path) -> Measured:
    reason = missing()
    if reason is not None:
        return Measured({}, [], details={"left_out": {"parity": reason}})
    return Measured(*measure_parity(folder))


def _step(folder: Path, sizes: AcceleratorSizes) -> Measured:
    found = measure_step(folder, write_teacher(folder, sizes), sizes.step, sizes.rounds)
    return replace(found, figures={**found.figures, **peak_gb()})


def _codec(sizes: AcceleratorSizes) -> Measured:
    stream = np.random.default_rng(0).standard_normal(sizes.codec, np.float32)
    return Measured(
        {f"{choice.label}.{name}": v for choice in CHOICES for name, v in measure_speed(stream, choice).items()}, []
    )


def write_teacher(folder: Path, sizes: AcceleratorSizes) -> str:
    """A checkpoint of the random teacher with a tokenizer of bytes."""
    path = folder / "teacher"
    save_pretrained(random_teacher(sizes.memory), path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return str(path)
