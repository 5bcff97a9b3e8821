"""The ways of computing experts against loops over tokens in double precision, values and gradients; and on meshes."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distillcache.models.layers import experts as module
from distillcache.models.layers.experts import Experts, Gating, apply_experts

WAYS = ("dense", "tiled", "ragged")
# No two axes are equal. Rows and experts divide by four.
B, T, D, F, E, K = 4, 3, 6, 10, 8, 2

BIASES = ("gate_bias", "up_bias", "down_bias")
Values = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for some experts, and one that is not full."""
    monkeypatch.setattr(module, "TILE", 4)


def given(experts: int = E, top_k: int = K, seed: int = 0) -> Values:
    """x, ids, weights, the three matrices, and the gradient that comes from above."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (B, T, D),
        "gate": (experts, D, F),
        "up": (experts, D, F),
        "down": (experts, F, D),
        "above": (B, T, D),
    }
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(B * T)]).reshape(B, T, top_k).astype(np.int32)
    return found | {"ids": ids, "weights": rng.random((B, T, top_k)).astype(np.float32) + 0.1}


def by_hand(values: Values, weighs_input: bool) -> tuple[np.ndarray, Values]:
    """The output, and the gradients of `sum(output * above)`, a token and an expert at a time."""
    wide = {name: value.astype(np.float64) for name, value in values.items() if name != "ids"}
    out = np.zeros_like(wide["x"])
    slopes = {name: np.zeros_like(wide[name]) for name in ("x", "weights", "gate", "up", "down")}
    for at in np.ndindex(*values["ids"].shape):
        cell, expert = at[:2], values["ids"][at]
        x, share, above = wide["x"][cell], wide["weights"][at], wide["above"][cell]
        gate, up, down = (wide[name][expert] for name in ("gate", "up", "down"))
        before, after = (share, 1.0) if weighs_input else (1.0, share)
        entering = before * x
        g, u = entering @ gate, entering @ up
        s = 1 / (1 + np.exp(-g))
        hidden = g * s * u
        out[cell] += after * (hidden @ down)
        d_hidden = down @ (after * above)
        d_g, d_u = d_hidden * u * s * (1 + g * (1 - s)), d_hidden * g * s
        d_entering = gate @ d_g + up @ d_u
        slopes["down"][expert] += np.outer(hidden, after * above)
        slopes["gate"][expert] += np.outer(entering, d_g)
        slopes["up"][expert] += np.outer(entering, d_u)
        slopes["x"][cell] += before * d_entering
        slopes["weights"][at] += d_entering @ x if weighs_input else above @ (hidden @ down)
    return out, slopes


Arrays = dict[str, jax.Array]


def slopes_and_output(
    arrays: Arrays,
    ids: jax.Array,
    above: jax.Array,
    *,
    way: str,
    weighs_input: bool = False,
    gating: Gating = lambda gate, up: jax.nn.silu(gate) * up,
) -> tuple[Arrays, jax.Array]:
    """The same of `apply_experts`."""

    def loss(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        experts = Experts(*(arrays.get(name) for name in Experts._fields))  # type: ignore[arg-type]
        x, weights = arrays["x"], arrays["weights"]
        out = apply_experts(experts, x, ids, weights, gating, way=way, weighs_input=weighs_input)
        return jnp.sum(out * above), out

    return jax.grad(loss, has_aux=True)(arrays)


def split(values: Any) -> tuple[Arrays, jax.Array, jax.Array]:
    names = ("x", "weights", "gate", "up", "down", *BIASES)
    arrays = {name: jnp.asarray(values[name]) for name in names if name in values}
    return arrays, jnp.asarray(values["ids"]), jnp.asarray(values["above"])


@cache
def compiled(way: str, weighs_input: bool) -> Callable[..., tuple[Arrays, jax.Array]]:
    """One program for each shape."""
    return jax.jit(partial(slopes_and_output, way=way, weighs_input=weighs_input))


def run(values: Values, way: str, weighs_input: bool = False) -> tuple[jax.Array, Arrays]:
    """Output and gradients on one device."""
    slopes, out = compiled(way, weighs_input)(*split(values))
    return out, slopes


def assert_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Relative to the largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= rtol * np.abs(expected).max()


def assert_same(values: Values, way: str, weighs_input: bool = False) -> None:
    out, slopes = run(values, way, weighs_input)
    expected, wanted = by_hand(values, weighs_input)
    assert_close(out, expected)
    for name, slope in slopes.items():
        assert_close(slope, wanted[name])


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_by_hand(way: str, weighs_input: bool):
    assert_same(given(), way, weighs_input)


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_may_choose_the_same_experts(way: str):
    """The others get no token, and a gradient of zero."""
    values = given()
    values["ids"] = np.broadcast_to(np.asarray([6, 1], np.int32), (B, T, K))
    assert_same(values, way)
    _, slopes = run(values, way)
    idle = [expert for expert in range(E) if expert not in (1, 6)]
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(np.asarray(slopes[name])[idle], 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_may_name_an_expert_twice(way: str):
    values = given()
    values["ids"] = np.repeat(values["ids"][..., :1], K, axis=-1)
    assert_same(values, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("experts", "top_k"), [(5, 3), (3, 3), (1, 1)])
def test_any_number_of_experts(way: str, experts: int, top_k: int):
    assert_same(given(experts, top_k), way)


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_stays_bfloat16_and_close(way: str, weighs_input: bool):
    values = given()
    half = {name: value if name in ("ids", "weights") else value.astype(jnp.bfloat16) for name, value in values.items()}
    out, slopes = run(half, way, weighs_input)
    assert out.dtype == jnp.bfloat16
    assert {name: slope.dtype.name for name, slope in slopes.items()} == {
        name: "float32" if name == "weights" else "bfloat16" for name in slopes
    }
    rounded = {name: value if name == "ids" else value.astype(np.float32) for name, value in half.items()}
    expected, wanted = by_hand(rounded, weighs_input)
    assert_close(out, expected, rtol=2e-2)  # bfloat16 tells numbers 2^-8 apart, here through three products
    for name, slope in slopes.items():
        assert_close(slope, wanted[name], rtol=3e-2)


def test_auto_is_dense_on_cpus():
    values = given()
    np.testing.assert_array_equal(run(values, "auto")[0], run(values, "dense")[0])


def test_an_unknown_way_is_refused():
    with pytest.raises(KeyError, match="sparse"):
        run(given(), "sparse")


# On a mesh. The numbers of one device are those by hand.

MESHES = [
    {"expert": 2},
    {"expert": 4},
    {"data": 2},
    {"fsdp": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"tensor": 2, "expert": 2},
]


def make_mesh(sizes: dict[str, int]) -> Mesh:
    names = ("block", "data", "fsdp", "tensor", "expert")  # as in trainer/mesh/sharding.py
    shape = [sizes.get(name, 1) for name in names]
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def place(values: Values, mesh: Mesh) -> tuple[Arrays, jax.Array, jax.Array]:
    """Rows and experts where the trainer lays them."""
    rows = PartitionSpec(("data", "fsdp"))
    by_expert = "expert" if values["gate"].shape[0] % mesh.shape["expert"] == 0 else None
    specs: dict[str, PartitionSpec] = dict.fromkeys(("x", "weights", "ids", "above"), rows)
    specs |= dict.fromkeys(("gate", "up"), PartitionSpec(by_expert, "fsdp", "tensor"))
    specs["down"] = PartitionSpec(by_expert, "tensor", "fsdp")
    specs |= dict.fromkeys(BIASES, PartitionSpec(by_expert))
    return split({name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in values.items()})


Step = Callable[..., tuple[Arrays, jax.Array]]


def on_abstract(mesh: Mesh, step: Step) -> Step:
    """As trainer/step/program.py does it: the mesh is the ambient one while the step is traced."""

    def apply(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args)

    return apply


def on_set(mesh: Mesh, step: Step) -> Step:
    def apply(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return jax.jit(step)(*args)

    return apply


def within_blocks(mesh: Mesh, step: Step) -> Step:
    """As trainer/step/program.py does it with a mesh axis `block`: inside a map over it."""
    same = PartitionSpec()
    return jax.shard_map(step, mesh=mesh, in_specs=same, out_specs=same, axis_names={"block"}, check_vma=False)


def on_mesh(
    values: Values, sizes: dict[str, int], way: str, *, ambient: Any = on_abstract, **options: Any
) -> tuple[jax.Array, Arrays]:
    """`run` on a mesh."""
    mesh = make_mesh(sizes)
    step = ambient(mesh, partial(slopes_and_output, way=way, **options))
    slopes, out = (step if ambient is on_set else jax.jit(step))(*place(values, mesh))
    return out, slopes


def assert_same_on_mesh(values: Values, sizes: dict[str, int], way: str, **options: Any) -> None:
    out, slopes = on_mesh(values, sizes, way, **options)
    expected, wanted = by_hand(values, options.get("weighs_input", False))
    assert_close(out, expected)
    for name, slope in slopes.items():
        assert_close(slope, wanted[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_changes_nothing(way: str):
    assert_same_on_mesh(given(), {"data": 2, "expert": 2}, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_mesh_changes_anything(sizes: dict[str, int], way: str):
    assert_same_on_mesh(given(), sizes, way)
    assert_same_on_mesh(given(seed=1), sizes, way, weighs_input=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_that_is_set(way: str):
    assert_same_on_mesh(given(), {"data": 2, "fsdp": 2, "expert": 2}, way, ambient=on_set)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_within_groups_of_blocks(way: str):
    assert_same_on_mesh(given(), {"block": 2, "data": 2, "expert": 2}, way, ambient=within_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_experts_that_do_not_divide_are_on_all_devices(way: str):
    assert_same_on_mesh(given(experts=6), {"expert": 4}, way)
    assert_same_on_mesh(given(experts=6), {"data": 2, "expert": 4}, way)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_on_a_mesh(way: str):
    """XLA on CPU aborts the process where it is asked for the sum of bfloat16 over the axis of a shard_map."""
    values = given()
    half = {name: value if name in ("ids", "weights") else value.astype(jnp.bfloat16) for name, value in values.items()}
    out, slopes = on_mesh(half, {"data": 2, "expert": 2}, way)
    alone, wanted = run(half, way)
    assert out.dtype == jnp.bfloat16
    assert_close(out, alone, rtol=2e-2)
    for name, slope in slopes.items():
        assert slope.dtype == wanted[name].dtype
        assert_close(slope, wanted[name], rtol=3e-2)


# Biases, and another gated unit than `silu(gate) * up`.


def bent(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jnp.clip(up, -1.0, 1.0) + 1) * jnp.minimum(gate, 1.0) * jax.nn.sigmoid(1.3 * gate)


def every_expert(arrays: Arrays, ids: jax.Array, above: jax.Array) -> tuple[Arrays, jax.Array]:
    """Of all experts on all tokens, those that were chosen; differentiated as it stands."""

    def loss(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        gate, up = (
            jnp.einsum("btd,edf->btef", arrays["x"], arrays[name]) + arrays[f"{name}_bias"] for name in ("gate", "up")
        )
        out = jnp.einsum("btef,efd->bted", bent(gate, up), arrays["down"]) + arrays["down_bias"]
        chosen = jnp.take_along_axis(out, ids[..., None], axis=2) * arrays["weights"][..., None]
        return jnp.sum(chosen.sum(2) * above), chosen.sum(2)

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("way", WAYS)
def test_biases_and_another_gated_unit(way: str):
    """On one device and on a mesh. Tiles and groups that are not full must not count in a bias's gradient."""
    rng = np.random.default_rng(2)
    biases = {name: rng.normal(size=(E, D if name == "down_bias" else F)).astype(np.float32) for name in BIASES}
    values = given() | biases
    wanted, expected = jax.jit(every_expert)(*split(values))
    alone = jax.jit(partial(slopes_and_output, way=way, gating=bent))(*split(values))
    for slopes, out in (alone, on_mesh(values, {"data": 2, "expert": 2}, way, gating=bent)[::-1]):
        assert_close(out, expected)
        for name, slope in wanted.items():
            assert_close(slopes[name], slope)
