"""A `config.json`, read key by key: every value checked, every key accounted for.

The list of keys is closed. A key is understood, or known not to change what the model computes, or refused by name: a
key that we do not know may be one that changes the numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distillcache.models.config import ModelConfig, RopeConfig
from distillcache.models.families.reading.keys import NEUTRAL_VALUES, STATED, is_harmless
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location

# HF's name -> ours. `gelu_new` writes out the tanh approximation that `gelu_pytorch_tanh` calls by name.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
EXPORTED_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"} | {
    name: name for name in ("silu", "gelu", "relu", "relu2", "xielu")
}

# What no model exceeds; a larger number is a typing error, and would cost hours or memory before any tensor is seen.
MOST = 2**31 - 1
NEAREST_0, FARTHEST = 1e-30, 1e30  # of what float32 computes with: nearer is 0 in it, farther soon infinite
# Under these null may mean that there is none, so it does not stand for a default.
SWITCHED_OFF_BY_NULL = ("sliding_window", "attention_chunk_size", "head_dim")
FALSE_BY_NULL = ("norm_topk_prob", "rope_interleave")  # switches that transformers asks for their truth
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2000,  # the deepest model known has 126
    "num_nextn_predict_layers": 2000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")

# rope kind -> (required, optional) parameters, and their field in RopeConfig.
ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "proportional": ((), ("factor",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("original_max_position_embeddings", "attention_factor", "factor")),
}
ROPE_FIELDS = {"original_max_position_embeddings": "original_max_positions"}
POSITIVE = f"a positive number that float32 holds, from {NEAREST_0:g} to {FARTHEST:g}"
ROPE_LEAST, ROPE_MOST = 1e-6, 1e9  # of factors of frequencies, lengths and amplitudes
ROPE_LISTS = ("short_factor", "long_factor")
ORIGINAL = "original_max_position_embeddings"
ROPE_POSITIVE = ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
PARTIAL = "partial_rotary_factor"


class Values:
    """The keys of a `config.json`, with the defaults of its family for those that it leaves out."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        defaults: Mapping[str, Any],
        file: Location,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            aliases: other spellings of keys.

        Raises:
            CheckpointError: a key is there in two spellings that disagree.
        """
        self._raw, self.file = dict(raw), file
        for other, key in (aliases or {}).items():
            if (value := self._raw.pop(other, None)) is None:
                continue
            if self._raw.get(key) is None:
                self._raw[key] = value
            elif self._raw[key] != value:
                raise bad_value(file, other, value, f"the same as {key}, which is {_short(self._raw[key])}")
        self._values = {**defaults, **self._raw}
        self._defaults = dict(defaults)
        self._stated: list[str] = []

    def check_keys(self, understood: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise `CheckpointError` for a key that may change the numbers in a way that is not understood.

        Null says nothing under any key. Keys of `STATED` wait for `check_stated`.

        Args:
            understood: keys that are read, or known to be harmless.
            neutral: keys that change nothing as long as they have one of these values, beside those of all families.
        """
        for key, value in self._values.items():
            if key in understood or is_harmless(key) or value is None:
                continue
            allowed = neutral.get(key, NEUTRAL_VALUES.get(key, ()))
            if any(_same(value, each) for each in allowed):
                continue
            if key not in STATED:
                raise unknown_key(self.file, key, value)
            self._stated.append(key)

    def check_stated(self, config: ModelConfig) -> None:
        """Raise `CheckpointError` for a key that the family does not read and that contradicts what was read."""
        for key in self._stated:
            if not _same(self[key], STATED[key](config)):
                raise unknown_key(self.file, key, self[key])

    def __getitem__(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        return self._values.get(key)

    def is_null(self, key: str) -> bool:
        """Tell whether the file has the key, and says null under it."""
        return key in self._raw and self._raw[key] is None

    def _given(self, key: str) -> Any:
        """The value; the family's default where null stands for that."""
        value = self[key]
        return self._defaults.get(key) if value is None and key not in SWITCHED_OFF_BY_NULL else value

    def size(self, key: str) -> int:
        value = self._given(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, "a positive whole number")
        if value > (most := LARGEST.get(key, MOST)):
            raise self.bad(key, f"at most {most}")
        return value

    def size_or_none(self, key: str) -> int | None:
        return None if self[key] is None else self.size(key)

    def count(self, key: str) -> int:
        """A size that may be 0, and is where it is null."""
        return 0 if self[key] in (None, 0) and self[key] is not False else self.size(key)

    def number(self, key: str) -> float:
        value = self._given(key)
        if not is_number(value) or not value > 0:
            raise self.bad(key, POSITIVE)
        return float(value)

    def number_or_zero(self, key: str) -> float:
        value = self._given(key)
        return 0.0 if is_number(value) and value == 0 else self.number(key)

    def number_or_none(self, key: str) -> float | None:
        return None if self[key] is None else self.number(key)

    def flag(self, key: str) -> bool:
        if self[key] is None and key in FALSE_BY_NULL and key in self._raw:
            return False
        value = self._given(key)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def blocks(self, key: str, count: int) -> list[int]:
        """A list of block numbers below `count`; empty where it is null."""
        value = [] if self[key] is None else self[key]
        if not isinstance(value, list) or not all(_is_index(at, count) for at in value):
            raise self.bad(key, f"a list of block numbers from 0 to {count - 1}")
        return value

    def per_block(self, key: str, allowed: Sequence[Any], count: int) -> list[Any] | None:
        """One of `allowed` for each of `count` blocks; None where it is null."""
        value = self[key]
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(entry not in allowed for entry in value):
            raise self.bad(key, f"{count} of {', '.join(map(str, allowed))}, one for each block")
        return value

    def activation(self, key: str = "hidden_act") -> str:
        value = self._given(key)
        if not isinstance(value, str) or value not in ACTIVATION_NAMES:
            raise self.bad(key, ", ".join(ACTIVATION_NAMES))
        return ACTIVATION_NAMES[value]

    def rope(
        self,
        *,
        theta: float = 10_000.0,
        fraction: float = 1.0,
        partial: bool = False,
        kinds: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
    ) -> RopeConfig:
        """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

        Args:
            theta, fraction: what transformers assumes for this family where the file is silent.
            partial: the family knows heads of which only a part is rotated.
            kinds: other names of kinds, with ours.
            ignored: parameters that change nothing of text.
        """
        raw = {**self._raw, ORIGINAL: self.size_or_none(ORIGINAL)}
        longest = self.size("max_position_embeddings")
        return rope_from_hf(raw, longest, self.file, theta, fraction, partial, kinds, ignored)

    def bad(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that cannot be used."""
        return bad_value(self.file, key, self[key], expected)


def rope_from_hf(
    raw: Mapping[str, Any],
    max_positions: int,
    file: Location,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    partial: bool = False,
    kinds: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> RopeConfig:
    """See `Values.rope`."""
    given = {key: _rope_dict(raw, key, file, kinds or {}) for key in ("rope_scaling", "rope_parameters")}
    old, new = ({k: v for k, v in given[key].items() if k not in ("rope_theta", PARTIAL)} for key in given)
    if old and new and old != new:
        raise CheckpointError(
            "rope_scaling and rope_parameters disagree",
            {"file": file, "rope_scaling": old, "rope_parameters": new},
            "remove the wrong one",
        )
    parameters = given["rope_parameters"] | given["rope_scaling"]
    for key in ignored:
        parameters.pop(key, None)
    parameters.pop("finetuned", None)  # of the first YaRN models; says how they came about
    parameters.pop("attn_factor", None)  # vLLM's name for a factor that transformers does not apply under it
    kind = parameters.pop("rope_type", "default")
    base = _base(raw, given, file, theta)
    parameters.pop("rope_theta", None)
    inner = parameters.pop(PARTIAL, None)
    share = next((value for value in (inner, raw.get(PARTIAL)) if value is not None), fraction)
    if not is_number(share) or not 0 < share <= 1 or (share != 1 and not partial):
        raise bad_value(file, PARTIAL, share, "above 0, at most 1" if partial else "1: the whole head is rotated")
    if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
        raise CheckpointError(
            "this rope_type is not supported",
            {"file": file, "found": kind, "supported": ", ".join(ROPE_PARAMETERS)},
            "use a checkpoint with a supported rope_type",
        )
    _check_rope_keys(parameters, kind, file)
    if kind in ("llama3", "yarn", "longrope"):
        _add_lengths(parameters, kind, raw.get(ORIGINAL), max_positions, file)
    # None means transformers' default, which is RopeConfig's own.
    fields: dict[str, Any] = {
        ROPE_FIELDS.get(key, key): tuple(map(float, value)) if key in ROPE_LISTS else value
        for key, value in parameters.items()
        if value is not None
    }
    return RopeConfig(theta=base, kind=kind, fraction=float(share), **fields)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    required, optional = ROPE_PARAMETERS[rope.kind]
    found = {key: getattr(rope, ROPE_FIELDS.get(key, key)) for key in (*required, *optional)}
    if rope.kind == "proportional" and rope.factor == 1:
        del found["factor"]  # transformers warns of it, and reads it
    written = {key: list(value) if key in ROPE_LISTS else value for key, value in found.items() if value is not None}
    partial = {PARTIAL: rope.fraction} if rope.fraction != 1 else {}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **written, **partial}


def _rope_dict(raw: Mapping[str, Any], key: str, file: Location, kinds: Mapping[str, str]) -> dict[str, Any]:
    """`rope_scaling` or `rope_parameters` with `rope_type` spelled out; empty where absent or null.

    transformers 5 renames a `rope_type` and leaves the old name in `type` beside it.
    """
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_value(file, key, value, "an object or null")
    value = dict(value)
    legacy = value.pop("type", None)  # transformers before 4.43
    kind = value.pop("rope_type", None)
    named = [kinds.get(each, each) if isinstance(each, str) else each for each in (kind, legacy) if each is not None]
    if len(named) == 2 and named[0] != named[1]:
        raise bad_value(file, f"{key}.type", legacy, f"the same as rope_type beside it, which is {kind}")
    return {"rope_type": named[0] if named else "default"} | value


def _base(raw: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]], file: Location, theta: float) -> float:
    """The base of the frequencies, which may stand in three places: versions of transformers differ in which counts."""
    inside = {f"{key}.rope_theta": parameters.get("rope_theta") for key, parameters in given.items()}
    stated = {
        name: value for name, value in {**inside, "rope_theta": raw.get("rope_theta")}.items() if value is not None
    }
    for name, value in stated.items():
        if not is_number(value) or not value > 1:
            raise bad_value(file, name, value, f"a number above 1, at most {FARTHEST:g}")
    (first, base), *others = [*stated.items(), ("", theta)]
    for name, value in others:
        if name and value != base:
            raise bad_value(file, name, value, f"the same as {first}, which is {base}")
    return float(base)


def _add_lengths(parameters: dict[str, Any], kind: str, beside: int | None, max_positions: int, file: Location) -> None:
    """Fill in the length that frequencies are scaled from, which may stand beside the other parameters and goes before
    the one among them; and where that is known the factor, which is then that of the two lengths."""
    inside = parameters.get(ORIGINAL)
    if inside and beside and inside != beside:
        raise bad_value(file, f"rope parameter {ORIGINAL}", inside, f"{beside}, as beside it, where it is the default")
    parameters[ORIGINAL] = beside or inside or max_positions
    if parameters.get("factor") is None:
        if not (inside or beside):
            raise bad_value(file, "rope parameter factor", "nothing", f"a number, or {ORIGINAL}, for rope_type {kind}")
        parameters["factor"] = max_positions / parameters[ORIGINAL]


def _check_rope_keys(parameters: dict[str, Any], kind: str, file: Location) -> None:
    required, optional = ROPE_PARAMETERS[kind]
    for key in parameters:
        if key not in (*required, *optional):
            raise unknown_key(file, f"rope parameter {key} of rope_type {kind}", parameters[key])
    for key in required:
        if parameters.get(key) is None:
            expected = "numbers" if key in ROPE_LISTS else "a number"
            raise bad_value(file, f"rope parameter {key}", "nothing", f"{expected}, for rope_type {kind}")
    for key, value in parameters.items():
        if (problem := _rope_problem(key, value)) is not None:
            raise bad_value(file, f"rope parameter {key}", value, problem)


def _rope_problem(key: str, value: Any) -> str | None:
    """Return what was expected in place of a parameter's value; None if it can be used."""
    if value is None:
        return None
    if key == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if key in ROPE_LISTS:
        right = isinstance(value, list) and all(is_number(each) and ROPE_LEAST <= each <= ROPE_MOST for each in value)
        return None if right else f"a list of numbers from {ROPE_LEAST:g} to {ROPE_MOST:g}"
    if not is_number(value):
        return "a number"
    if key == ORIGINAL and (value < 1 or value != int(value)):
        return "a positive whole number"
    if (value == 0 and key not in ROPE_POSITIVE) or ROPE_LEAST <= value <= ROPE_MOST:
        return None
    zero = "" if key in ROPE_POSITIVE else "0, or "
    return f"{zero}a number from {ROPE_LEAST:g} to {ROPE_MOST:g}"


def unknown_key(file: Location, key: str, value: object) -> CheckpointError:
    """The error for an unknown key that may change what the model computes."""
    return CheckpointError(
        "the config has a setting that is not supported, and that may change what the model computes",
        {"file": file, "key": key, "value": _short(value)},
        "use another checkpoint, or remove the key if you know that this model computes the same without it",
    )


def bad_value(file: Location, key: str, value: object, expected: str) -> CheckpointError:
    """The error for a value that cannot be used."""
    return CheckpointError(
        "the config has a value that cannot be used",
        {"file": file, "key": key, "found": _short(value), "expected": expected},
        "correct the value",
    )


def is_number(value: object) -> bool:
    """Return whether a value is 0 or a number of a size that float32 computes with; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or NEAREST_0 <= abs(value) <= FARTHEST


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _same(value: object, allowed: object) -> bool:
    """Equal, where True is not 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _short(value: object, width: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
