"""Both ways of computing experts against loops over tokens in double precision, values and gradients; and on meshes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.experts import Experts, apply_experts

WAYS = ("dense", "ragged")
# No two axes are equal. Rows and experts divide by four.
B, T, D, F, E, K = 4, 3, 6, 10, 8, 2

Values = dict[str, np.ndarray]


def given(experts: int = E, top_k: int = K, seed: int = 0) -> Values:
    """x, ids, weights, the three matrices, and the gradient that comes from above."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, T, D), "gate": (experts, D, F), "up": (experts, D, F), "down": (experts, F, D), "above": (B, T, D)}
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


def run(values: Values, way: str, weighs_input: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same of `apply_experts`."""
    ids, above = jnp.asarray(values["ids"]), jnp.asarray(values["above"])

    def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        experts = Experts(arrays["gate"], arrays["up"], arrays["down"])
        out = apply_experts(
            experts, arrays["x"], ids, arrays["weights"], jax.nn.silu, way=way, weighs_input=weighs_input
        )
        return jnp.sum(out * above), out

    arrays = {name: jnp.asarray(values[name]) for name in ("x", "weights", "gate", "up", "down")}
    slopes, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
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
    values["ids"] = np.broadcast_to(np.int32([6, 1]), (B, T, K))
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
    names = ("data", "fsdp", "tensor", "expert")  # as trainer/sharding.py has them, without block
    shape = [sizes.get(name, 1) for name in names]
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def in_abstract_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """As trainer/step.py does it: the mesh is the ambient one while the step is traced."""

    def apply(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return apply


def on_mesh(values: Values, sizes: dict[str, int], way: str, *, weighs_input: bool = False, set_mesh: bool = False):
    """`run` with rows and experts laid out on the mesh, as the trainer lays them out."""
    mesh = make_mesh(sizes)

    def loss(arrays: dict[str, jax.Array], ids: jax.Array, above: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts = Experts(arrays["gate"], arrays["up"], arrays["down"])
        out = apply_experts(
            experts, arrays["x"], ids, arrays["weights"], jax.nn.silu, way=way, weighs_input=weighs_input
        )
        return jnp.sum(out * above), out

    rows, by_expert = ("data", "fsdp"), "expert" if values["gate"].shape[0] % sizes.get("expert", 1) == 0 else None
    specs = dict.fromkeys(("x", "weights", "ids", "above"), PartitionSpec(rows))
    specs |= dict.fromkeys(("gate", "up"), PartitionSpec(by_expert, "fsdp", "tensor"))
    specs["down"] = PartitionSpec(by_expert, "tensor", "fsdp")
    placed = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in values.items()}
    arrays = {name: placed[name] for name in ("x", "weights", "gate", "up", "down")}
    step = jax.grad(loss, has_aux=True)
    if set_mesh:
        with jax.set_mesh(mesh):
            slopes, out = jax.jit(step)(arrays, placed["ids"], placed["above"])
    else:
        slopes, out = jax.jit(in_abstract_mesh(mesh, step))(arrays, placed["ids"], placed["above"])
    return out, slopes


def assert_same_on_mesh(values: Values, sizes: dict[str, int], way: str, **options: bool) -> None:
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
    assert_same_on_mesh(given(), {"data": 2, "fsdp": 2, "expert": 2}, way, set_mesh=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_experts_that_do_not_divide_are_on_all_devices(way: str):
    assert_same_on_mesh(given(experts=6), {"expert": 4}, way)
    assert_same_on_mesh(given(experts=6), {"data": 2, "expert": 4}, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_on_a_mesh(way: str):
    values = given()
    half = {name: value if name in ("ids", "weights") else value.astype(jnp.bfloat16) for name, value in values.items()}
    out, slopes = on_mesh(half, {"data": 2, "expert": 2}, way)
    alone, wanted = run(half, way)
    assert out.dtype == jnp.bfloat16
    assert_close(out, alone, rtol=2e-2)
    for name, slope in slopes.items():
        assert_close(slope, wanted[name], rtol=3e-2)
