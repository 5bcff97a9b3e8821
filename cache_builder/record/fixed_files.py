"""The files of a segment that do not depend on its rows."""

from collections.abc import Callable, Iterator

import safetensors.numpy
import tensorstore as ts

from distillcache.models.checkpoint import load_head
from distillcache.models.decoder import Decoder
from distillcache.models.describe import attention_norms
from distillcache.models.head import read_head
from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.segment import Segment, part_metadata, read_small_file, segment_number
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.store.store import Store


def fixed_files(plan: Plan, decoder: Decoder, tokenizer: TextTokenizer, teacher: str) -> dict[str, bytes]:
    """Return the files that do not depend on the rows, by key: the tokenizer, the arrays' metadata, the teacher's
    attention norms, and its head where the plan keeps it.

    Args:
        teacher: the path of its checkpoint, since a decoder's head may lie on devices of other processes.
    """
    prefix = layout.segment_prefix(plan.segment)
    files = {layout.TOKENIZER: tokenizer.to_json().encode()} if segment_number(plan.segment) == 0 else {}
    side = {**attention_norms(decoder), **signs_of(plan)}
    files[f"{prefix}/side.safetensors"] = safetensors.numpy.save(side)
    if plan.keeps_head:
        files[layout.head_key(plan.segment)] = load_head(teacher, plan.numerics.dtype).to_bytes()
    return files | array_files(plan)


def unvouched_damage(store: Store, plan: Plan) -> Iterator[tuple[str, DamageError]]:
    """Check these files of a segment that is being built, by key.

    No digest is noted of them yet, but for the teacher's norms they follow from the plan. They are there before
    the first shard is.
    """
    checks: dict[str, Callable[[], object]] = {
        f"{layout.segment_prefix(plan.segment)}/side.safetensors": Segment(store, plan, None).side
    }
    if plan.keeps_head:
        checks[layout.head_key(plan.segment)] = lambda: read_head(Segment(store, plan, None))
    if segment_number(plan.segment) == 0:
        checks[layout.TOKENIZER] = lambda: cache_tokenizer(store, plan)
    for key, value in array_files(plan).items():
        checks[key] = lambda key=key, value=value: read_small_file(store, key, digest_bytes(value))
    for key, check in checks.items():
        try:
            check()
        except DamageError as error:
            yield key, error


def array_files(plan: Plan) -> dict[str, bytes]:
    """The metadata of a segment's zarr arrays, by key."""
    files = {}
    for tap in plan.taps:
        for part in tap.parts:
            context = ts.Context()
            memory = {"driver": "memory", "path": "array/"}
            ts.open(layout.array_spec(memory, part_metadata(plan, part)), create=True, context=context).result()
            metadata = ts.KvStore.open(memory, context=context).result().read("zarr.json").result().value
            files[f"{layout.array_folder(plan.segment, part.array)}/zarr.json"] = metadata
    return files
