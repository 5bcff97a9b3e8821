"""Keys of a GGUF file's metadata about its architecture: each understood, harmless or refused by name.

Source: llama.cpp `conversion/base.py` (TextModel) and `llama-model.cpp`.
"""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from distillcache.models.families.reading.values import MOST, is_number
from distillcache.models.files.gguf.file import metadata
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location

SOFTMAX, SIGMOID = 1, 2  # of `expert_gating_func`
# Keys that say nothing about the forward pass, or repeat what a tensor's shape says.
HARMLESS_KEYS = frozenset({"vocab_size", "rope.scaling.finetuned"})
UNDERSTOOD_KEYS = frozenset(
    """attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon
    attention.value_length block_count context_length embedding_length expert_count expert_feed_forward_length
    expert_shared_feed_forward_length expert_used_count feed_forward_length rope.dimension_count rope.freq_base
    rope.scale_linear rope.scaling.factor rope.scaling.original_context_length rope.scaling.type""".split()  # noqa: SIM905 - one a line would be half a screen
)
# Keys that would change the forward pass, with the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_scale": (1.0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}
LARGEST = {"block_count": 2000, "expert_count": 2**16, "attention.head_count": 2**16, "attention.key_length": 2**16}


class GgufValues:
    """The keys of a file's architecture, each understood, harmless or refused."""

    def __init__(
        self,
        reader: gguf.GGUFReader,
        name: str,
        file: Location,
        known: frozenset[str],
        neutral: Mapping[str, tuple[Any, ...]],
    ) -> None:
        """known: keys beside those of every architecture. neutral: see `NEUTRAL_VALUES`."""
        self.name, self.file = name, file
        prefix = f"{name}."
        self._values = {
            key.removeprefix(prefix): metadata(reader, key) for key in reader.fields if key.startswith(prefix)
        }
        known = UNDERSTOOD_KEYS | HARMLESS_KEYS | known
        for key, value in self._values.items():
            if key not in known and value not in neutral.get(key, ()):
                self.refuse(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        most = LARGEST.get(key, MOST)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.bad(key, value, f"one whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number, as the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06, so that an export
        reads as its source."""
        value = self.get(key, default)
        if not is_number(value) or not value > 0:
            raise self.bad(key, value, "one positive number")
        return float(str(np.float32(value)))

    def bad(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error for a value that cannot be used."""
        return CheckpointError(
            "the GGUF file has a value that cannot be used",
            {"file": self.file, "key": self.key(key), "found": str(value)[:120], "expected": expected},
            "use a file whose blocks all have one size, or the model's HF directory",
        )

    def key(self, key: str) -> str:
        """As the file spells it."""
        return f"{self.name}.{key}"

    def refuse(self, key: str, value: object) -> None:
        """Raise the error for a setting that is not supported."""
        raise CheckpointError(
            "the GGUF file has a setting that is not supported, and that may change what the model computes",
            {"file": self.file, "key": self.key(key), "value": value},
            "use another file, or the model's HF directory",
        )
