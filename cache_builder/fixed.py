"""The files of a segment that do not depend on its rows."""

import safetensors.numpy
import tensorstore as ts

from models.decoder import Decoder
from models.describe import attention_norms
from models.tokenizer import TextTokenizer
from schemas import layout
from schemas.manifest import Plan
from schemas.segment import part_metadata, segment_number
from schemas.tap_codec import signs_of


def fixed_files(plan: Plan, decoder: Decoder, tokenizer: TextTokenizer) -> dict[str, bytes]:
    """What does not depend on the rows, by key: the tokenizer, the arrays' metadata, the teacher's attention norms."""
    prefix = layout.segment_prefix(plan.segment)
    files = {layout.TOKENIZER: tokenizer.to_json().encode()} if segment_number(plan.segment) == 0 else {}
    side = {**attention_norms(decoder), **signs_of(plan)}
    files[f"{prefix}/side.safetensors"] = safetensors.numpy.save(side)
    return files | array_files(plan)


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
