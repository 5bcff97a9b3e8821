"""Adapters as files: merged into the tensors of every family, and as a folder for peft whose layout NumPy pins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.models.adapters import adapter_names, sides
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.files.adapter import save_adapter
from distillcache.models.files.runs import RunCheckpoint
from distillcache.models.mesh.sharding import make_mesh
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.format.checkpoint import CheckpointRecord, commit, held_whole, write_arrays
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.store import Store
from tests.models.conftest import GOLDEN
from tests.models.files.test_runs import flat
from tests.models.test_checkpoint import assert_same_parameters
from tests.servers.fixtures import Bucket

RANK, ALPHA = 2, 3.0
PREFIX = "base_model.model."


def random_adapters(decoder: Decoder, *chosen: str) -> dict[str, np.ndarray]:
    """Of the matrices whose names contain one of these."""
    rng, found = np.random.default_rng(0), {}
    for name, value in flat(decoder).items():
        size = sides(name, value.shape)
        if size is not None and any(part in name for part in chosen):
            a, b = adapter_names(name)
            found[a] = rng.normal(0, 0.1, (value.shape[0], size[0], RANK)).astype(np.float32)
            found[b] = rng.normal(0, 0.1, (value.shape[0], RANK, size[1])).astype(np.float32)
    return found


def write_run(run: Path | str, decoder: Decoder, parameters: dict[str, np.ndarray]) -> RunCheckpoint:
    """A run with one checkpoint of these parameters."""
    save_pretrained(decoder, f"{run}/student")
    store, folder = Store(str(run)), "checkpoints/00000001"
    held = {f"parameters/{name}": held_whole(value) for name, value in parameters.items()}
    write_arrays(store, folder, 0, "a", held | {"adapters/alpha": held_whole(np.asarray(ALPHA))})
    digest = digest_bytes(store.read(f"{folder}/p0000.json") or b"")
    commit(store, folder, CheckpointRecord(step=1, feed={}, parts=(digest,)))
    return RunCheckpoint(locate(str(run)), 1)


def changes(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter's folder adds to each tensor, by peft's rules: the first pattern that matches gives rank and
    alpha."""
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]

        def own(what: str, default: float, module: str = module) -> float:
            patterns = settings[what].items()
            return next((n for key, n in patterns if module == key or module.endswith(f".{key}")), default)

        assert a.shape[0] == b.shape[1] == own("rank_pattern", settings["r"])
        scale = own("alpha_pattern", settings["lora_alpha"]) / own("rank_pattern", settings["r"])
        found[f"{module}.weight"] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return found


def adapted_by_peft(folder: Path) -> set[str]:
    """The tensors of the base whose modules peft would adapt: named in full, or by the end of their names."""
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    modules = [name.removesuffix(".weight") for name in load_file(folder / "base" / "model.safetensors")]
    return {f"{m}.weight" for m in modules if any(m == target or m.endswith(f".{target}") for target in targets)}


@pytest.mark.parametrize("family", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_merged_is_base_and_adapter(family: str, tmp_path: Path) -> None:
    base = load_pretrained(GOLDEN / family, dtype="float32")
    run = write_run(tmp_path / "run", base, random_adapters(base, "/attention/", "/shared_up"))
    save_adapter(run.open(), base, tmp_path / "adapter")
    save_pretrained(load_pretrained(tmp_path / "run"), tmp_path / "merged")
    added = changes(tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(added) == adapted_by_peft(tmp_path / "adapter")
    assert set(before) == set(after)
    for name, value in before.items():
        expected = value.astype(np.float64) + added.pop(name, 0.0)
        np.testing.assert_allclose(after[name], expected, atol=1e-6, rtol=1e-6)
        if (expected == value).all():
            np.testing.assert_array_equal(after[name], value)
    assert not added


def test_the_layout_is_pefts(tiny: Decoder, tmp_path: Path) -> None:
    """Every name and shape, of a Llama: written out, so that no rule of ours decides them."""
    run = write_run(tmp_path / "run", tiny, adapters := random_adapters(tiny, "attention/q", "attention/o", "mlp/down"))
    save_adapter(run.open(), tiny, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = tiny.config
    heads, inner, width = model.num_heads * model.head_dim, model.intermediate_size, model.hidden_size
    sizes = {"self_attn.q_proj": (width, heads), "self_attn.o_proj": (heads, width), "mlp.down_proj": (inner, width)}
    expected = {}
    for layer in range(model.num_blocks):
        for module, (into, out) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            expected |= {f"{name}.lora_A.weight": (RANK, into), f"{name}.lora_B.weight": (out, RANK)}
    assert {name: value.shape for name, value in tensors.items()} == expected
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}
    first = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].astype(np.float32)
    np.testing.assert_allclose(first, adapters["groups/0/blocks/0/lora/attention/q/a"][0].T, rtol=2**-8)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings == settings | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "out" / "base"),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "fan_in_fan_out": False,
        "bias": "none",
    }


def test_matrices_that_are_stored_as_one(tmp_path: Path) -> None:
    """Queries and values alone of Phi-3's `qkv_proj`: keys stay."""
    base = load_pretrained(GOLDEN / "phi3", dtype="float32")
    run = write_run(tmp_path / "run", base, random_adapters(base, "attention/q", "attention/v"))
    save_adapter(run.open(), base, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["rank_pattern"], settings["alpha_pattern"]) == (
        RANK,
        {"qkv_proj": 2 * RANK},
        {"qkv_proj": 2 * ALPHA},
    )
    heads, keys = base.config.num_heads * base.config.head_dim, base.config.num_kv_heads * base.config.head_dim
    added = changes(tmp_path / "adapter")["model.layers.0.self_attn.qkv_proj.weight"]
    assert not added[heads : heads + keys].any()
    assert added[:heads].any()
    assert added[heads + keys :].any()


def test_a_mesh_merges_the_same(tiny: Decoder, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny, random_adapters(tiny, "attention", "mlp"))
    mesh = make_mesh(TeacherMeshConfig(fsdp=2, tensor=2))
    assert_same_parameters(load_pretrained(tmp_path / "run", mesh=mesh), load_pretrained(tmp_path / "run"))


def test_merged_weights_are_rounded_once(tiny: Decoder, tmp_path: Path) -> None:
    """In bfloat16 the sum is rounded, not its parts."""
    write_run(tmp_path / "run", tiny, random_adapters(tiny, "attention/q"))
    wide, narrow = (flat(load_pretrained(tmp_path / "run", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    name = "groups/0/blocks/0/attention/q"
    np.testing.assert_array_equal(narrow[name], wide[name].astype(narrow[name].dtype))


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"embed": np.zeros((2, 2), np.float32)}, "trained no adapters"),
        ({"groups/0/blocks/0/mlp/router_bias": np.zeros((1, 2), np.float32)}, "changed more than its adapters"),
    ],
)
def test_runs_that_are_no_adapter(parameters: dict[str, np.ndarray], what: str, tiny: Decoder, tmp_path: Path) -> None:
    if "more" in what:
        parameters = parameters | random_adapters(tiny, "attention/q")
    run = write_run(tmp_path / "run", tiny, parameters)
    with pytest.raises(CheckpointError, match=what):
        save_adapter(run.open(), tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_student(tiny: Decoder, tmp_path: Path) -> None:
    adapters = {name: value[:, :-1] for name, value in random_adapters(tiny, "attention/q").items()}
    write_run(tmp_path / "run", tiny, adapters)
    with pytest.raises(CheckpointError, match="not of the student's shape"):
        load_pretrained(tmp_path / "run")


def test_an_export_replaces_its_own_alone(tiny: Decoder, tmp_path: Path) -> None:
    """An adapter takes the place of an adapter and of a merged export, which takes its place in turn; what others put
    there stays."""
    run, out = write_run(tmp_path / "run", tiny, random_adapters(tiny, "attention/q")), tmp_path / "out"
    for _ in range(2):
        save_adapter(run.open(), tiny, out)
        save_adapter(run.open(), tiny, out)
        assert sorted(path.name for path in out.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "base",
        ]
        save_pretrained(tiny, out)
        assert "base" not in [path.name for path in out.iterdir()]
    for place in ("notes.txt", "base/notes.txt"):
        save_adapter(run.open(), tiny, tmp_path / place.replace("/", "-"))
        (tmp_path / place.replace("/", "-") / place).write_text("mine")
        with pytest.raises(CheckpointError, match="not made by an export"):
            save_adapter(run.open(), tiny, tmp_path / place.replace("/", "-"))
    save_pretrained(tiny, tmp_path / "with-base")
    (tmp_path / "with-base" / "base").mkdir()
    with pytest.raises(CheckpointError, match="not made by an export"):
        save_pretrained(tiny, tmp_path / "with-base")


def test_an_adapter_in_a_bucket(s3: Bucket, tiny: Decoder, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny, random_adapters(tiny, "attention/q"))
    save_adapter(run.open(), tiny, tmp_path / "out")
    for _ in range(2):  # the second replaces the first
        save_adapter(run.open(), tiny, f"{s3.url}/out")
        here = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
        assert Store(f"{s3.url}/out").keys("") == here
    assert load_pretrained(f"{s3.url}/out/base").config == tiny.config
