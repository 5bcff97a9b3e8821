"""Importance of the teacher's heads, neurons, experts and stream dimensions, measured on rows of the cache.

The recorded `resid` and `attn_out` give every sublayer its exact input, so each is run by itself, block by block. Over
the real tokens of the rows:

    heads (H)     mean norm of what the head adds to the attention's output; of a block with the gated delta rule its
                  value heads likewise, of one with Mamba-2 its heads (N)
    neurons (F)   mean magnitude of the activation, times the norm of the neuron's row of the output projection
    experts (E)   mean weight in the mixture, which is 0 for tokens that take others
    stream (D)    root mean square of the number over the streams that enter the blocks, each first divided by its own
                  root mean square: later streams are larger, and would be all that counts

Source: Minitron (arXiv 2407.14679) measures widths by activations likewise.

Rows are the first of the training split, in batches of one fixed size, summed in float64 on the host: the figures
depend neither on the run's batch size nor on the number of its processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Bool

from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.mlp import Mlp, NoMlp
from distillcache.models.layers.recurrent.gated_delta import GatedDelta
from distillcache.models.layers.recurrent.mamba import AttentionBesideMamba, Mamba2
from distillcache.models.layers.recurrent.short_conv import ShortConv
from distillcache.models.layers.sublayer import NoMixer, TokenMixer, pre_norm, second_input
from distillcache.models.surgery import Scores
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError, DistillcacheError, InputError, NonFiniteError
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.source import Batch, Source
from distillcache.trainer.step.parameters import Parameters, StackAddress, all_parameters, at_address, sublayer
from distillcache.trainer.step.stack import Given, StudentStack, scan_blocks
from distillcache.trainer.step.targets import BlockTargets, TapReading, Targets, evaluation_targets, student_spans

IMPORTANCE = "importance.safetensors"  # in the run's folder
MEASURED_ROWS = 4  # at a time; fixed, since XLA's bits depend on a batch's shape
STREAM, OF = "stream", "of"  # names of arrays; the second says what was measured
# Operations that importance can guide.
CHOOSING = ("query_heads", "kv_heads", "value_heads", "mlp_width", "experts", "hidden_size")
OpenSource = Callable[[Sequence[str], Sequence[int] | None], Source]


def teacher_importance(run: Store, teacher: Decoder, rows: int, open_source: OpenSource) -> Scores:
    """The importance of the teacher's parts: out of the run's folder, or measured now and kept there.

    Args:
        rows: how many of the first training rows count; fewer where there are not so many.
        open_source: the training rows with some taps.

    Raises:
        ConfigError: the cache lacks what is needed.
    """
    if (lack := find_lack(teacher.config.num_blocks, open_source)) is not None:
        raise lack
    source = open_source(("resid", "attn_out"), None)
    counted = min(rows, len(source))
    of = f"cache {source.digest}, rows {counted}"
    kept = run.read(IMPORTANCE)
    if kept is not None and (found := _unpacked(kept, of)) is not None:
        return found
    scores = measure_importance(teacher, source, counted)
    run.write(IMPORTANCE, _packed(scores, of))
    return scores


def is_measured(op: SurgeryOp, init: str) -> bool:
    """Return whether an operation chooses by importance, on rows that allow it.

    Args:
        init: the source of the student's weights, as StudentConfig has it.
    """
    if op.by is not None:
        return op.by == "importance"
    return init == "teacher" and (op.op in CHOOSING or (op.op == "upcycle" and op.how == "partition"))


def find_lack(num_blocks: int, open_source: OpenSource) -> DistillcacheError | None:
    """Return what rows lack for a measurement in all blocks; None if it can be made."""
    source = open_source((), None)
    missing = {"resid", "attn_out"} - {tap.name for segment in source.segments() for tap in segment.plan.taps}
    if missing:
        return ConfigError(
            "importance is measured on the recorded streams, and the cache lacks some",
            {"cache": f"{source.url}/{MANIFEST}", "missing": ", ".join(sorted(missing))},
            "choose by: weight_norm, or add the tap: distillcache build --extend (online: name it in online.taps)",
        )
    source = open_source(("resid", "attn_out"), None)
    if absent := sorted(set(range(num_blocks)) - set(source.blocks)):
        return ConfigError(
            "importance is measured in every block, and the cache lacks some",
            {"cache": f"{source.url}/{MANIFEST}", "missing": absent},
            "choose by: weight_norm, or add the blocks: distillcache build --extend "
            "(online: set online.taps, which records every block)",
        )
    if len(source) == 0:
        return InputError("there are no training rows to measure importance on", {"cache": source.url})
    return None


def measure_importance(teacher: Decoder, source: Source, rows: int) -> Scores:
    """The importance of the parts of the decoder that the source's taps were recorded from, on its first rows."""
    config = teacher.config
    spans = student_spans(config, config.num_blocks, None)
    targets, reading, _ = evaluation_targets(config, spans, source, None)
    measured = _Measured(StudentStack(teacher), reading)
    parameters, tokens = all_parameters(teacher), 0.0
    totals: dict[StackAddress, dict[str, np.ndarray]] = {address: {} for address in measured.stack.places()}
    with Progress("importance", rows, unit="rows") as bar:
        for start in range(0, rows, MEASURED_ROWS):
            numbers = list(range(start, min(start + MEASURED_ROWS, rows)))
            batch = source[numbers + [start] * (MEASURED_ROWS - len(numbers))]
            batch["segment_ids"][len(numbers) :] = 0
            tokens += float(np.sum(batch["segment_ids"] > 0))
            for address, sums in _sums(measured, parameters, batch, targets).items():
                for letter, value in sums.items():
                    totals[address][letter] = totals[address].get(letter, 0.0) + np.asarray(value, np.float64)
            bar.advance(len(numbers))
    blocks = [
        {letter: value[repeat] / max(tokens, 1.0) for letter, value in totals[group, address].items()}
        for _, group, repeat, address in config.places()
    ]
    squares = np.stack([block.pop("D") for block in blocks])
    squares = squares / np.maximum(np.mean(squares, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    scores = Scores(tuple(blocks), np.sqrt(np.mean(squares, axis=0)))
    _raise_if_not_finite(scores, source.url)
    return scores


def _raise_if_not_finite(scores: Scores, url: str) -> None:
    """Raise `NonFiniteError` where a sum overflowed: by such scores the wrong parts would be chosen."""
    for block, found in enumerate(scores.blocks):
        for letter, value in found.items():
            if not np.isfinite(value).all():
                raise NonFiniteError(
                    "the importance of the teacher's heads, neurons or experts is not finite",
                    {
                        "cache": url,
                        "block": block,
                        "axis": letter,
                        "found": f"{np.sum(~np.isfinite(value))} of {value.size}",
                    },
                    "check the teacher's weights, or choose by: weight_norm",
                )
    if not np.isfinite(scores.stream).all():
        raise NonFiniteError(
            "the importance of the stream's dimensions is not finite",
            {"cache": url, "axis": "D", "found": f"{np.sum(~np.isfinite(scores.stream))} of {scores.stream.size}"},
            "check the teacher's weights, or choose by: weight_norm",
        )


@dataclass(frozen=True)
class _Measured:
    """The static side of a batch's program: what runs, and how it is read."""

    stack: StudentStack
    reading: TapReading


@partial(jax.jit, static_argnums=(0,))
def _sums(
    measured: _Measured, parameters: Parameters, batch: Batch, targets: Targets
) -> dict[StackAddress, dict[str, Array]]:
    """Sums over a batch's real tokens, `[repeats, size]` of every place and axis letter."""
    stack, mask = measured.stack, batch["segment_ids"] > 0
    context = stack.context(batch)

    def visit(address: StackAddress, mine: Any, own: Any, given: Given, row: BlockTargets) -> tuple[Any, Any]:
        attention, mlp = (sublayer(stack.graphs[address][name], name, own) for name in ("attention", "mlp"))
        added = _head_norms(attention, given.resid, context)
        sums = {letter: _over(norms, mask) for letter, norms in added.items()}
        sums |= {"D": _over(jnp.square(given.resid), mask)}
        middle = given.resid + given.attn_out  # type: ignore[operator] - the source reads both
        middle = second_input(attention, given.resid, middle)
        if isinstance(mlp, NoMlp):
            return mine, sums
        if isinstance(mlp, Mlp):
            weight = jnp.linalg.norm(mlp.down[...], axis=1)
            return mine, sums | {"F": _over(jnp.abs(mlp.hidden(middle)), mask) * weight}
        router = mlp(middle, context)[1]
        shares = jax.nn.one_hot(router.ids, mlp.moe.num_experts) * jnp.abs(router.weights)[..., None]
        return mine, sums | {"E": _over(jnp.sum(shares, axis=-2), mask)}

    taps = {name: batch[name] for name in measured.reading.codecs}
    nothing = dict.fromkeys(stack.places(), ())
    fixed = {address: at_address(parameters, address) for address in stack.places()}
    return scan_blocks(stack, targets, measured.reading, taps, mask.shape, visit, nothing, fixed, needs_mlp=False)[1]


def _head_norms(mixer: TokenMixer, resid: Array, context: BlockContext) -> dict[str, Array]:
    """The norm of what each of a mixer's heads adds, `[B, T, heads]`, by axis letter."""
    if isinstance(mixer, NoMixer):
        return {}
    x = pre_norm(mixer, resid)
    letter = "N" if isinstance(mixer, GatedDelta | Mamba2) else "C" if isinstance(mixer, ShortConv) else "H"
    found = {letter: _added_norms(mixer.mix(x, context), mixer.o[...])}
    if isinstance(mixer, AttentionBesideMamba):
        found["N"] = _added_norms(mixer.mamba_mix(x, context), mixer.own("o"))
    return found


def _added_norms(heads: Array, output: Array) -> Array:
    """The norm of what each head adds, `[B, T, H]`, of `[B, T, H, h]` and the output projection `[H, h, D]`.

    By the inner products of a head's rows: all heads' additions, `[B, T, H, D]`, would be the largest array by far.
    """
    products = jnp.einsum("hkd,hjd->hkj", output, output)
    squares = jnp.einsum("bthk,hkj,bthj->bth", heads, products, heads)
    return jnp.sqrt(jnp.maximum(squares, 0.0))


def _over(value: Array, mask: Bool[Array, "B T"]) -> Array:
    """The sum over real tokens of `[B, T, size]`."""
    return jnp.sum(jnp.where(mask[..., None], value, 0.0), axis=(0, 1))


def _packed(scores: Scores, of: str) -> bytes:
    arrays = {f"blocks/{at}/{letter}": v for at, block in enumerate(scores.blocks) for letter, v in block.items()}
    return safetensors.numpy.save({**arrays, STREAM: scores.stream, OF: np.frombuffer(of.encode(), np.uint8)})


def _unpacked(data: bytes, of: str) -> Scores | None:
    """Unpack a stored measurement; None if it is of other rows or cannot be read."""
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError:
        return None
    if arrays.pop(OF).tobytes() != of.encode():
        return None
    stream = arrays.pop(STREAM)
    blocks: dict[int, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        _, block, letter = name.split("/")
        blocks.setdefault(int(block), {})[letter] = value
    return Scores(tuple(blocks[at] for at in sorted(blocks)), stream)
