"""Facts about the teacher, the rows and the machine that a plan records, because its numbers depend on them."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from distillcache.models.checkpoint import read_config, weights_digest
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.layers.rope import context_length
from distillcache.models.layers.sublayer import NoMixer
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.format.manifest import NumericsPlan, RowsPlan, TapPlan, TeacherPlan
from distillcache.schemas.format.rows import RowReader
from distillcache.schemas.store.store import is_url

NUMERIC_LIBRARIES = ("jax", "jaxlib", "flax")  # what turns a plan into bits
# Of the decoder's own roundings below float32, which no library's version tells. 2: norms, rotations, gates and sums of
# experts are float32 inside, and rounded once. Plans without it are of revision 1; float32 has the same bits in both.
FORWARD = "forward"
FORWARD_REVISION = "2"
COMPRESSING_LIBRARY = "tensorstore"  # it brings its own zstd and blosc


def describe_teacher(path: str, model: ModelConfig, digest: str | None = None) -> TeacherPlan:
    """Return the plan's facts about the teacher. digest: of its weights; None: read them all to compute it."""
    return TeacherPlan(
        path=path,
        weights_digest=weights_digest(path) if digest is None else digest,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        family=model.family,
        norm_eps=model.norm_eps,
        context=context_length(model),
    )


def teacher_context(teacher: TeacherPlan) -> int | None:
    """The longest document that a plan's teacher is made for, in tokens; None if unknown.

    A plan of an earlier version does not say. Then the config of the checkpoint does, if it is still on this machine.
    """
    if teacher.context is not None or is_url(teacher.path):
        return teacher.context
    try:
        model = read_config(teacher.path)
    except DistillcacheError:  # whoever needs the teacher itself is told
        return None
    same = (model.num_blocks, model.hidden_size) == (teacher.num_blocks, teacher.hidden_size)
    return context_length(model) if same else None


def attention_norms(decoder: Decoder) -> dict[str, Float[np.ndarray, "L D"]]:
    """Return the factors of every block's attention norm in float32, as a segment's side file stores them: also for
    a family that stores them minus one; ones where a block has no mixer. Empty for a family whose attention receives
    the stream without a norm, or under another one than an RMS norm.
    """
    if decoder.config.norms in ("post", "by_mixer") or decoder.config.norm_product == "centred":
        return {}
    offset = 1.0 if decoder.config.norm_product == "offset" else 0.0

    def of_block(group: Any, block: Any) -> np.ndarray:
        if isinstance(block.attention, NoMixer):
            return np.ones((group.repeats, decoder.config.hidden_size), np.float32)
        return np.asarray(block.attention.norm[...], np.float32) + np.float32(offset)

    def of_group(group: Any) -> np.ndarray:
        stacked = np.stack([of_block(group, block) for block in group.blocks], axis=1)
        return stacked.reshape(-1, stacked.shape[-1])

    return {"attention_norm": np.concatenate([of_group(group) for group in decoder.groups])}


def describe_rows(rows: RowReader) -> RowsPlan:
    """Return the plan's facts about these rows."""
    index = rows.index
    return RowsPlan(
        count=index.rows,
        eval_indices=index.eval_indices,
        row_tokens=index.row_tokens,
        tokens=index.tokens,
        content_digest=index.content_digest,
        text_digest=index.text_digest,
        tokenizer_digest=index.tokenizer_digest,
        vocab_size=index.vocab_size,
        eos_id=index.eos_id,
    )


def describe_numerics(
    dtype: str, taps: Sequence[TapPlan], mesh: tuple[int, ...] = (1,), processes: int = 1, attention: str = "xla"
) -> NumericsPlan:
    """Return the facts that determine bits on this machine. On a CPU this includes its architecture, since XLA compiles
    for it.

    Args:
        mesh, processes, attention: as of `NumericsPlan`.
    """
    device = jax.devices()[0]
    kind = f"cpu:{platform.machine()}" if device.platform == "cpu" else device.device_kind
    return NumericsPlan(
        dtype=dtype,
        attention=attention,
        mesh=mesh,
        processes=processes,
        platform=kind,
        versions={name: version(name) for name in NUMERIC_LIBRARIES}
        | ({} if dtype == "float32" else {FORWARD: FORWARD_REVISION})
        | compressor_version(taps),
    )


def compressor_version(taps: Sequence[TapPlan]) -> dict[str, str]:
    """Return the version that determines the bytes of compressed chunks; empty if nothing is compressed, since every
    version stores that in the same way.
    """
    compressed = any(tap.compress != "none" for tap in taps)
    return {COMPRESSING_LIBRARY: version(COMPRESSING_LIBRARY)} if compressed else {}
