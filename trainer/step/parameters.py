"""A student's parameters by name, and the selection of the trained ones.

All parameters are one flat dict: `embed`, `final_norm`, `head`, and `groups/<g>/blocks/<p>/<path>`, stacked over the
repeats of layer group g, for every place p of its pattern. Projectors, where the student's width is not the teacher's,
are `groups/<g>/blocks/<p>/projector/{in,out}` `[repeats, D, D]`; they are trained and kept in checkpoints, and are no
part of the student. Adapters are `groups/<g>/blocks/<p>/lora/<sublayer>/<matrix>/{a,b}`; where there are any, the
student's own parameters are not trained.

A *place* is a (g, p); its parameters without their prefix (`attention/q`) are what a block is called with.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from distillcache.models.adapters import LORA
from distillcache.models.decoder import Decoder
from distillcache.models.files.tensors import FLOAT32
from distillcache.models.layers.mlp import Moe
from distillcache.schemas.errors import ConfigError

Parameters = dict[str, Array]
StackAddress = tuple[int, int]  # (layer group, position in its pattern): one stack of equal blocks
PROJECTOR = "projector"
BESIDE = (LORA, PROJECTOR)  # in the place of a sublayer: no part of a decoder
[_BY_RULE] = Moe.by_rule
ROUTER_BIAS = f"mlp/{_BY_RULE}"
ROUTING = tuple(f"mlp/{name}" for name in Moe.routing)
# The teacher's end beside the student's parameters; the head is `[V, D]`, and sharded as such a table is.
TEACHER_NORM, TEACHER_HEAD = "teacher/final_norm", "teacher/embed"
INDEXER = "attention/index_*"  # its choice has no gradient
BEHIND_BLOCKS = ("final_norm", "head")  # parameters that compute logits, and nothing else
IN_BLOCK = "groups/*/blocks/*/"
# What becomes of parameters: (pattern of a whole name, whether it is trained); the first pattern that matches decides.
PathRules = Sequence[tuple[str, bool]]


def address_prefix(address: StackAddress) -> str:
    return f"groups/{address[0]}/blocks/{address[1]}/"


def all_parameters(decoder: Decoder) -> Parameters:
    """Copies of the decoder's parameters. Copies, because train steps donate their inputs."""
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return {"/".join(map(str, path)): jnp.copy(value.get_value()) for path, value in flat}


def install(decoder: Decoder, parameters: Mapping[str, Array | np.ndarray]) -> None:
    """Put copies of these parameters into the decoder; projectors have no place there."""
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    found = {"/".join(map(str, path)): (path, value) for path, value in flat}
    chosen = [
        (path, value.replace(jnp.copy(parameters[name]))) for name, (path, value) in found.items() if name in parameters
    ]
    nnx.update(decoder, nnx.from_flat_state(chosen))


def at_address(parameters: Mapping[str, Any], address: StackAddress) -> dict[str, Any]:
    """The parameters at an address, by path within the block."""
    prefix = address_prefix(address)
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def from_addresses(by_address: Mapping[StackAddress, Mapping[str, Any]]) -> dict[str, Any]:
    """The reverse of `at_address`, for several addresses."""
    return {
        address_prefix(address) + name: value for address, inner in by_address.items() for name, value in inner.items()
    }


def sublayer_of(name: str) -> str | None:
    """`attention` of `groups/0/blocks/0/attention/q`; None for what belongs to no block."""
    return name.split("/")[4] if name.startswith("groups/") else None


def outer(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Select the parameters that belong to no block."""
    return {name: value for name, value in parameters.items() if not name.startswith("groups/")}


def sublayer(graph: nnx.GraphDef[Any], name: str, parameters: Mapping[str, Array]) -> Any:
    """A block's sublayer with these parameters (`attention/q`), of which only its own are taken."""
    return nnx.merge(graph, {path.split("/", 1)[1]: v for path, v in parameters.items() if path.split("/")[0] == name})


def reached_by(rules: PathRules, names: Iterable[str]) -> list[str]:
    """The names that the rules declare trained.

    Raises:
        ValueError: a name that no rule declares, as of a new kind of sublayer.
    """
    found = []
    for name in names:
        trained = next((trained for pattern, trained in rules if fnmatchcase(name, pattern)), None)
        if trained is None:
            raise ValueError(f"{name} is declared neither trained nor frozen")
        if trained:
            found.append(name)
    return found


def choose_trained(names: Sequence[str], patterns: Sequence[str] | None, reached: Sequence[str]) -> frozenset[str]:
    """The parameters to train: those that match one of `patterns`, of those that a loss reaches. Of a student with
    adapters these and projectors alone.

    Args:
        patterns: parts of paths, whole names joined by `/`, with `*` inside a name: `attention`, `mlp/down`,
            `groups/0`, `*_bias`. None: everything that is reached.
        reached: the names that a loss has a gradient for.

    Raises:
        ConfigError: a pattern matches nothing, or nothing that a loss reaches.
    """
    adapts = any(sublayer_of(name) == LORA for name in names)
    if adapts:
        names, reached = ([name for name in each if sublayer_of(name) in BESIDE] for each in (names, reached))
        if not any(sublayer_of(name) == LORA for name in reached):
            raise ConfigError(
                "no loss of this stage reaches an adapter",
                {"student.lora": ", ".join(sorted({_short(name) for name in names}))},
                "choose other student.lora.targets, or give a loss that reaches them a weight",
            )
    if patterns is None:
        return frozenset(reached)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            what = "train_only names no parameter of the student"
            raise ConfigError(
                f"{what} that is trained: with student.lora these are the adapters" if adapts else what,
                {"train_only": pattern, "parameters": ", ".join(sorted({_short(name) for name in names}))},
                "name parts of these paths",
            )
    chosen = frozenset(name for name in reached if any(matches(name, pattern) for pattern in patterns))
    if not chosen:
        raise ConfigError(
            "no loss reaches what train_only names",
            {"train_only": ", ".join(patterns), "losses reach": ", ".join(sorted({_short(n) for n in reached}))},
            "name other parameters, or give a loss that reaches them a weight",
        )
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Return whether a parameter's path has these consecutive names, each with `*` for anything inside it."""
    parts, wanted = name.split("/"), pattern.strip("/").split("/")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def make_projectors(
    places: Mapping[StackAddress, int],
    student_width: int,
    teacher_width: int,
    seed: int,
    kept: Sequence[int] | None = None,
) -> Parameters:
    """Maps between the widths for every place, float32: `in` `[repeats, Dt, Ds]` of what a block is given, `out`
    `[repeats, Ds, Dt]` of what it adds.

    `in` starts as a random map that keeps lengths on average and `out` as its transpose, so that a block whose own
    weights were cut from a teacher of the same directions starts near it.

    Args:
        kept: the numbers of the teacher's stream that the student was cut to: `in` then starts by picking these.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for address, repeats in places.items():
        if kept is None:
            into = rng.normal(0.0, teacher_width**-0.5, (repeats, teacher_width, student_width)).astype(np.float32)
        else:
            picks = np.arange(teacher_width)[:, None] == np.asarray(kept)
            into = np.broadcast_to(picks.astype(np.float32), (repeats, teacher_width, student_width))
        found[f"{address_prefix(address)}{PROJECTOR}/in"] = jnp.asarray(into)
        found[f"{address_prefix(address)}{PROJECTOR}/out"] = jnp.asarray(into.swapaxes(1, 2).copy())
    return found


def cast(parameters: Mapping[str, Array], dtype: str, kept: Collection[str] = ()) -> dict[str, Array]:
    """Cast parameters for the forward and backward pass, all but `FLOAT32` and those that are named in `kept`."""
    return {
        name: value if name.rpartition("/")[2] in FLOAT32 or name in kept else value.astype(dtype)
        for name, value in parameters.items()
    }


def _short(name: str) -> str:
    """`attention/q` of `groups/0/blocks/0/attention/q`."""
    return name.split("/", 4)[-1] if name.startswith("groups/") else name
