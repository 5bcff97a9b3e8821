"""The decoder against HF transformers: stored values (tests/golden/make_*.py), and exports read back by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distillcache.models.checkpoint import fill_decoder, load_pretrained, open_tensors, read_config, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.families import FAMILIES, LANGUAGE_MODELS, layout_of
from distillcache.models.files.tensors import Layout, tensor_slots
from distillcache.models.surgery import apply_surgery
from distillcache.schemas.config.train import SurgeryOp
from tests.models.conftest import GOLDEN, transformers_model

NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))
# Both ways of running experts in the families whose routers and experts differ most; layers/test_experts.py compares
# the ways by themselves.
BOTH_WAYS = ("deepseek_v3", "gpt_oss", "llama4", "mixtral")
# Whose code runs in another model of the list as well.
TWINS = (
    "flex_olmo",
    "olmo_hybrid_plain",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next_plain",
    "qwen3_vl",
    "seed_oss",
    "solar_open",
)
WAYS = [
    pytest.param(
        name, way, marks=[pytest.mark.slow] if name in TWINS or (way == "dense" and name not in BOTH_WAYS) else []
    )
    for name in NAMES
    for way in (("dense", "ragged") if read_config(GOLDEN / name).moe else ("auto",))
]
# But for those whose configs cannot say that heads are missing, those whose heads are of two widths, and those whose
# blocks take over what others chose.
CUT = [name for name in NAMES if name not in ("olmoe", "phi3", "glm_moe_dsa") and not name.startswith("gemma4")]

# Relative to the largest value. Two orders of summation in float32 differ by at most 4.3e-6 on these models, their
# gradients by 2e-5: a recurrence adds up over a row.
TOLERANCE, GRADIENT = 5e-6, 2e-5


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert np.shape(found) == expected.shape
    worst = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert worst < TOLERANCE


def golden_decoder(name: str, way: str) -> Decoder:
    config = replace(read_config(GOLDEN / name), experts=way)
    return fill_decoder(config, open_tensors(GOLDEN / name, config), jnp.dtype("float32"))


def packed_of(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The packed row and its values; where none is stored, the documents of `tokens` one after the other."""
    if "packed_tokens" in expected:
        return {key.removeprefix("packed_"): value for key, value in expected.items() if key.startswith("packed_")}
    rows, length = expected["tokens"].shape
    before = {"tokens": 0, "logits": 0, "attn_out": 1, "resid": 1}
    found = {
        key: expected[key].reshape(*expected[key].shape[:axes], 1, rows * length, *expected[key].shape[axes + 2 :])
        for key, axes in before.items()
    }
    positions, segments = np.tile(np.arange(length), rows), np.repeat(np.arange(1, rows + 1), length)
    return found | {"positions": positions[None], "segment_ids": segments[None]}


def padded(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, [(0, 0), (0, width - rows.shape[1])])


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_golden_values(name: str, way: str):
    """The rows of one document each, padded, and the packed row behind them: in one forward pass, compiled once."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    packed = packed_of(expected)
    (rows, length), real = expected["tokens"].shape, packed["logits"].shape[1]
    plain = {
        "tokens": expected["tokens"],
        "positions": np.tile(np.arange(length), (rows, 1)),
        "segment_ids": np.ones((rows, length), int),
    }
    width = max(length, packed["tokens"].shape[1])
    given = {key: np.concatenate([padded(part[key], width) for part in (plain, packed)]) for key in plain}
    decoder = golden_decoder(name, way)
    names = ("attn_out", "resid", "mlp_out")
    out = jax.jit(lambda given: decoder(**given, taps=names, router="experts" in expected))(given)
    taps = {key: np.asarray(value) for key, value in out.taps.items()}
    assert_close(taps["resid"][1:] - taps["resid"][:-1] - taps["attn_out"], taps.pop("mlp_out"))
    found = {"logits": np.asarray(out.logits)[None], **taps}
    for key, value in found.items():
        assert_close(value[:, :rows, :length], expected[key].reshape(value.shape[0], rows, length, -1))
        assert_close(value[:, rows:, :real], packed[key].reshape(value.shape[0], 1, real, -1))
    if "experts" in expected:
        assert out.router is not None
        ids = np.sort(out.router.ids, axis=-1)
        np.testing.assert_array_equal(ids[:, :rows, :length], expected["experts"])
        np.testing.assert_array_equal(ids[:, rows:, :real], packed["experts"])
        real_tokens, experts = given["segment_ids"] > 0, out.router.probs.shape[-1]
        counts = [
            [np.bincount(row[kept].ravel(), minlength=experts) for row, kept in zip(block, real_tokens, strict=True)]
            for block in ids
        ]
        np.testing.assert_array_equal(out.router.counts, counts)
    assert ("experts" in expected) == (decoder.config.moe is not None)


def test_every_family_has_golden_values():
    found = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert found == FAMILIES.keys() - {"bailing_moe", "bailing_moe_v2"}  # not in transformers: test_bailing.py


@pytest.mark.parametrize(("name", "cut"), [*((name, False) for name in NAMES), *((name, True) for name in CUT)])
def test_transformers_reads_our_export(name: str, cut: bool, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    decoder = load_pretrained(GOLDEN / name, jnp.float32)
    if cut:
        decoder = apply_surgery(decoder, [SurgeryOp(op="kv_heads", to=1)])
    save_pretrained(decoder, tmp_path / "export")
    model, info = transformers_model(
        tmp_path / "export", dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = load_file(GOLDEN / name / "expected.safetensors")["tokens"]
    ours = decoder(jnp.asarray(tokens)).logits
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if read_config(GOLDEN / name).family not in LANGUAGE_MODELS])
def test_gradients_are_those_of_transformers(name: str):
    """Of a sum of logits, each times a number of its own. What transformers keeps in other tensors than the files do
    (experts, OLMo's convolutions), and biases that have no gradient, are left out. Relative to the largest, or to a
    hundredth of the largest of all: keys of blocks without positions have a bias whose gradient is zero."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    model = transformers_model(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = load_file(GOLDEN / name / "expected.safetensors")["tokens"]
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # of which torch leaves out the gradient
    logits = model.eval()(torch.from_numpy(tokens)).logits
    above = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    (logits * torch.from_numpy(above)).sum().backward()
    config = read_config(GOLDEN / name)
    layout = layout_of(config)
    theirs = {
        filed(layout, name): weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None
    }
    graph, state = nnx.split(golden_decoder(name, "auto"))

    def total(state: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state)(jnp.asarray(tokens)).logits * above)

    slopes = nnx.to_flat_state(jax.jit(jax.grad(total))(state))
    ours = {path: np.asarray(value.get_value()) for path, value in slopes}
    missing, largest = [], max(np.abs(value).max() for value in theirs.values())
    for slot in tensor_slots(config, layout):
        if slot.name not in theirs:
            missing.append(slot.name)
            continue
        found, stored = ours[slot.path][slot.index], theirs[slot.name]
        if slot.part is not None and slot.part.is_run:  # where parameters take turns, `load` picks them
            stored = stored[slot.part.entries]
        expected = slot.load(stored, found.shape)
        assert np.abs(found - expected).max() < GRADIENT * max(np.abs(expected).max(), largest / 100), slot.name
    left_out = ("moe", "experts.", ".indexer.", "score_correction_bias", "expert_bias", "layer_scalar", "act_fn.")
    assert all(any(part in name for part in (*left_out, "_conv1d.")) for name in missing)


def filed(layout: Layout, name: str) -> str:
    """A parameter's name as files have it."""
    found = next((pair for pair in layout.spellings if name.startswith(pair[0])), ("", ""))
    name = found[1] + name.removeprefix(found[0])
    found = next((pair for pair in layout.endings if name.endswith(pair[0])), ("", ""))
    return name.removesuffix(found[0]) + found[1]


@pytest.mark.slow
def test_demo_teacher_knows_rome(demo_teacher: Path):
    """A quantised file, its tokenizer and the forward pass at once: any of them wrong, and Rome is not next."""
    from distillcache.models.text.tokenizer import load_tokenizer

    decoder, tokenizer = load_pretrained(demo_teacher), load_tokenizer(demo_teacher)
    ids = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    logits = decoder(jnp.array([ids])).logits
    assert logits is not None
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Rome"
