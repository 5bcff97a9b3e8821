"""A student's adapters before the first step: which matrices get one, and their numbers.

What an adapter is and adds: models/adapters.py.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from distillcache.models.adapters import IN_AXES, adapter_names, is_of_experts, short_name, sides
from distillcache.schemas.config.student import LoraConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.parameters import Parameters, matches

Shapes = Mapping[str, tuple[int, ...]]


def adapted(shapes: Shapes, targets: Sequence[str]) -> list[str]:
    """The matrices that these targets choose, in the order of the parameters.

    A target is a pattern as of `train_only`. Vectors and routers below it are left out; a target that chooses no matrix
    is refused, and so is one that would choose those of experts.

    Args:
        shapes: of all of a student's parameters, by name.
    """
    for target in targets:
        below = [name for name in shapes if matches(name, target)]
        experts = [name for name in below if is_of_experts(name, shapes[name])]
        if experts:
            raise ConfigError(
                "matrices of experts cannot have adapters",
                {"student.lora.targets": target, "found": _shown(experts)},
                _other_targets(shapes),
            )
        if not any(sides(name, shapes[name]) for name in below):
            raise ConfigError(
                "student.lora.targets names no matrix that can have an adapter",
                {"student.lora.targets": target, "found": _shown(below) or "no parameter of this name"},
                _other_targets(shapes),
            )
    return [n for n, shape in shapes.items() if sides(n, shape) and any(matches(n, target) for target in targets)]


def make_adapters(config: LoraConfig, shapes: Shapes, seed: int) -> Parameters:
    """The adapters of the matrices that the config names, float32: A `[repeats, in, rank]` random, B `[repeats, rank,
    out]` zeros, so that they add nothing yet.

    A is uniform in ±1/sqrt(in), as peft begins.

    Raises:
        ConfigError: the rank is larger than a side of one of the matrices, or what `adapted` raises.
    """
    rng = np.random.default_rng([seed, config.rank])
    found: Parameters = {}
    for name in adapted(shapes, config.targets):
        into, out = sides(name, shapes[name]) or (0, 0)
        if config.rank > min(into, out):
            raise ConfigError(
                "student.lora.rank is larger than a matrix",
                {"student.lora.rank": config.rank, "matrix": name, "expected": f"at most {min(into, out)}"},
                "lower it, or choose other targets: student.lora.targets",
            )
        a_name, b_name = adapter_names(name)
        repeats = shapes[name][0]
        found[a_name] = jnp.asarray(rng.uniform(-(into**-0.5), into**-0.5, (repeats, into, config.rank)), jnp.float32)
        found[b_name] = jnp.zeros((repeats, config.rank, out), jnp.float32)
    return found


def _shown(names: Sequence[str]) -> str:
    return ", ".join(sorted({name if not name.startswith("groups/") else short_name(name) for name in names}))


def _other_targets(shapes: Shapes) -> str:
    able = sorted({short_name(name) for name, shape in shapes.items() if sides(name, shape)}, key=list(IN_AXES).index)
    return f"name some of these: {', '.join(able)}; groups/0 before them means those of one layer group"
