"""MaxText's checkpoints: trees that Orbax wrote in MaxText's layout give the decoder of the same HF checkpoint.

The trees are made here from HF's tensors, by the rules of MaxText's own converter: names and hooks of
AI-Hypercomputer/maxtext, src/maxtext/checkpoint_conversion/utils/param_mapping.py, of LLAMA31, QWEN3, MIXTRAL (and
below of GEMMA2 and GEMMA3):

    params-decoder-layers-self_attention-query-kernel   [reshape_kernel, adjust_rope, scale_query_layer]
    params-decoder-layers-self_attention-key-kernel     [reshape_kernel, adjust_rope]
    params-decoder-layers-mlp-wi_0-kernel               gate_proj; wi_1 up_proj; wo down_proj: reshape_kernel
    params-decoder-layers-pre_self_attention_layer_norm-scale    input_layernorm
    params-decoder-layers-post_self_attention_layer_norm-scale   post_attention_layernorm
    params-decoder-layers-MoeBlock_0-gate-kernel, -wi_0, -wi_1, -wo     Mixtral: gate, w1, w3, w2; [E, L, ...]
    params-decoder-layers-moe_block-gate-kernel, -wi_0, ...             Qwen3 MoE
    params-token_embedder-embedding, params-decoder-decoder_norm-scale, params-decoder-logits_dense-kernel

    params-decoder-layers-self_attention_local-query-kernel    Gemma 2: blocks 0, 2, ...; _global: 1, 3, ...
    params-decoder-layers-layers_0-self_attention-query-kernel Gemma 3: blocks 0, 6, ...; layers_remainder-layers_0

`reshape_kernel` is `x.T.reshape(target_shape)`; `adjust_rope` puts the halves of a head side by side, pair by pair (of
Llama 3.1 alone); `scale_query_layer` multiplies by 1 / sqrt(head_dim) (of Llama, Mistral and Mixtral). Blocks are
stacked along axis 1 (`param_scan_axis`).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.config import ModelConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.mesh.sharding import make_mesh
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.store import Store
from tests.models.conftest import GOLDEN, randomized
from tests.models.test_checkpoint import assert_same_parameters
from tests.servers.fixtures import Bucket

ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax writes the checkpoints: the extra `maxtext`")

ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
DENSE = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
GEMMA_NORMS = ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm")
HF_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
BFLOAT16 = ml_dtypes.bfloat16
MIXTRAL = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}


def mlp_params(hf: dict[str, np.ndarray], prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Those of one block's MLP, or of its experts."""
    if config.moe is None:
        return {f"mlp.{theirs}.kernel": hf[f"{prefix}.mlp.{ours}.weight"].T for theirs, ours in DENSE.items()}
    mixtral = config.family == "mixtral"
    inside, names, moe = ("block_sparse_moe", MIXTRAL, "MoeBlock_0") if mixtral else ("mlp", DENSE, "moe_block")
    found = {f"{moe}.gate.kernel": hf[f"{prefix}.{inside}.gate.weight"].T}
    for theirs, ours in names.items():
        of_experts = [hf[f"{prefix}.{inside}.experts.{e}.{ours}.weight"].T for e in range(config.moe.num_experts)]
        found[f"{moe}.{theirs}"] = np.stack(of_experts)
    return found


def maxtext_params(folder: Path, *, scan: bool = True) -> dict[str, Any]:
    """MaxText's parameters for an HF checkpoint, as a flat dict by dotted path below `params`."""
    config, hf = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    hidden, family = config["hidden_size"], config["model_type"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    rope = (config.get("rope_scaling") or config.get("rope_parameters") or {}).get("rope_type")

    def block(prefix: str) -> dict[str, np.ndarray]:
        found = {
            "pre_self_attention_layer_norm.scale": hf[f"{prefix}.input_layernorm.weight"],
            "post_self_attention_layer_norm.scale": hf[f"{prefix}.post_attention_layernorm.weight"],
            "self_attention.out.kernel": hf[f"{prefix}.self_attn.o_proj.weight"].T.reshape(-1, dim, hidden),
        }
        if f"{prefix}.self_attn.o_proj.bias" in hf:
            found["self_attention.out.bias"] = hf[f"{prefix}.self_attn.o_proj.bias"]
        for theirs, ours in ATTENTION.items():
            kernel = hf[f"{prefix}.self_attn.{ours}.weight"].T.reshape(hidden, -1, dim)
            if rope == "llama3" and theirs != "value":
                halves = kernel[..., : dim // 2], kernel[..., dim // 2 :]
                kernel = np.stack(halves, axis=-1).reshape(kernel.shape)
            if theirs == "query" and family in ("llama", "mistral", "mixtral"):
                kernel = kernel * np.float32(1 / np.sqrt(dim))
            found[f"self_attention.{theirs}.kernel"] = kernel
            if f"{prefix}.self_attn.{ours}.bias" in hf:
                found[f"self_attention.{theirs}.bias"] = hf[f"{prefix}.self_attn.{ours}.bias"].reshape(-1, dim)
            if f"{prefix}.self_attn.{ours[0]}_norm.weight" in hf:
                found[f"self_attention.{theirs}_norm.scale"] = hf[f"{prefix}.self_attn.{ours[0]}_norm.weight"]
        return found | mlp_params(hf, prefix, read_config(folder))

    blocks = [block(f"model.layers.{number}") for number in range(config["num_hidden_layers"])]
    flat = {
        "token_embedder.embedding": hf["model.embed_tokens.weight"],
        "decoder.decoder_norm.scale": hf["model.norm.weight"],
    }
    if "lm_head.weight" in hf:
        flat["decoder.logits_dense.kernel"] = hf["lm_head.weight"].T
    if scan:
        return flat | {f"decoder.layers.{n}": np.stack([each[n] for each in blocks], axis=1) for n in blocks[0]}
    return flat | {f"decoder.layers_{at}.{n}": value for at, each in enumerate(blocks) for n, value in each.items()}


def gemma_folder(name: str, folder: Path, blocks: int, cycle: int) -> Path:
    """An HF checkpoint of this family, with a window in all blocks but each `cycle`-th."""
    config = read_config(GOLDEN / name)
    local, everywhere = config.kinds[0], config.kinds[1]
    kinds = [everywhere if (block + 1) % cycle == 0 else local for block in range(blocks)]
    plain = replace(config, layers=plan_layers(kinds), qkv_bias=False, output_bias=False, tie_embeddings=True)
    save_pretrained(randomized(Decoder(plain)), folder)
    return folder


def gemma_params(folder: Path, *, scan: bool) -> dict[str, np.ndarray]:
    """The same as `maxtext_params`, by the hooks of GEMMA2 and GEMMA3: `scale_rmsnorm` adds 1."""
    config, hf = read_config(folder), load_file(folder / "model.safetensors")
    second, hidden, dim = config.family == "gemma2", config.hidden_size, config.head_dim
    root = np.float32(np.sqrt(hidden))
    norms = dict(zip(GEMMA_NORMS, HF_NORMS, strict=True))
    flat = {
        "token_embedder.embedding": hf["model.embed_tokens.weight"] * (root if second else root.astype(BFLOAT16)),
        "decoder.decoder_norm.scale": hf["model.norm.weight"] + 1,
    }

    def block(number: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{number}"
        found = {f"{theirs}.scale": hf[f"{prefix}.{ours}.weight"] + 1 for theirs, ours in norms.items()}
        found |= {f"mlp.{theirs}.kernel": hf[f"{prefix}.mlp.{ours}.weight"].T for theirs, ours in DENSE.items()}
        found["self_attention.out.kernel"] = hf[f"{prefix}.self_attn.o_proj.weight"].T.reshape(-1, dim, hidden)
        for theirs, ours in ATTENTION.items():
            kernel = hf[f"{prefix}.self_attn.{ours}.weight"].T.reshape(hidden, -1, dim)
            found[f"self_attention.{theirs}.kernel"] = kernel
            if theirs != "value" and not second:
                found[f"self_attention.{theirs}_norm.scale"] = hf[f"{prefix}.self_attn.{ours[0]}_norm.weight"] + 1
        if second:
            found["self_attention.query.kernel"] = found["self_attention.query.kernel"] * np.float32(1 / np.sqrt(dim))
        return found

    blocks = [block(number) for number in range(config.num_blocks)]
    if not second:
        whole = config.num_blocks // 6 * 6 if scan else 0
        for at in range(6 if scan else 0):
            stacked = {n: np.stack([each[n] for each in blocks[at:whole:6]], axis=1) for n in blocks[0]}
            flat |= {f"decoder.layers.layers_{at}.{n}": value for n, value in stacked.items()}
        rest = "decoder.layers_remainder.layers_" if scan else "decoder.layers_"
        return flat | {f"{rest}{at}.{n}": v for at, each in enumerate(blocks[whole:]) for n, v in each.items()}
    for offset, kind in enumerate(("local", "global")):
        mine = [{_of_kind(n, kind): value for n, value in each.items()} for each in blocks[offset::2]]
        if scan:
            flat |= {f"decoder.layers.{n}": np.stack([each[n] for each in mine], axis=1) for n in mine[0]}
        else:
            flat |= {f"decoder.layers_{pair}.{n}": v for pair, each in enumerate(mine) for n, v in each.items()}
    return flat


def _of_kind(name: str, kind: str) -> str:
    """mlp_local.wi_0.kernel."""
    first, rest = name.split(".", 1)
    return f"{first}_{kind}.{rest}"


def write_orbax(folder: Path, flat: dict[str, np.ndarray], *, optimizer: bool = False, **options: bool) -> Path:
    """As MaxText saves a train state: `params` within `params`, beside step and optimizer."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parts, last = name.split(".")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.asarray(value)
    state = {"step": jnp.zeros((), jnp.int32), "params": {"params": tree}, "opt_state": {}}
    if optimizer:
        state["opt_state"] = {"0": {"mu": {"params": tree}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(state))
    return folder


def with_config(name: str, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(GOLDEN / name / "config.json", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("name", "blocks", "cycle"), [("gemma2", 4, 2), ("gemma3_text", 14, 6)])
def test_gemmas_blocks_take_turns(name: str, blocks: int, cycle: int, scan: bool, tmp_path: Path):
    hf = gemma_folder(name, tmp_path / "hf", blocks, cycle)
    write_orbax(tmp_path / "items", gemma_params(hf, scan=scan))
    (hf / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.copytree(tmp_path / "items", hf / "items")
    found = load_pretrained(hf, dtype="float32")
    shutil.rmtree(hf / "items")
    (tmp_path / "model.safetensors").rename(hf / "model.safetensors")
    for (path, one), (_, two) in zip(
        *(nnx.to_flat_state(nnx.state(x)) for x in (found, load_pretrained(hf, dtype="float32"))), strict=True
    ):
        # A norm's weight has lost what adding 1 has rounded off.
        np.testing.assert_allclose(one.get_value(), two.get_value(), rtol=3e-7, atol=2e-7, err_msg=str(path))


OTHERS = ["mistral_window", "qwen2", "qwen3_moe_plain"]
FAMILIES = ["llama_llama3", "qwen3", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
COMPUTED = ("llama_llama3", "mixtral")  # whose logits are compared too


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("llama_tied", marks=pytest.mark.slow)])
def test_equals_the_hf_checkpoint(name: str, tmp_path: Path):
    folder = with_config(name, tmp_path / "model")
    write_orbax(folder / "items", maxtext_params(GOLDEN / name), use_zarr3=True)
    assert_close(folder, name)


def assert_close(folder: Path, name: str) -> None:
    """Equal, but for queries, that were multiplied and divided by a root."""
    found, expected = load_pretrained(folder, dtype="float32"), load_pretrained(GOLDEN / name, dtype="float32")
    one, two = (dict(nnx.to_flat_state(nnx.state(x, nnx.Param))) for x in (found, expected))
    assert one.keys() == two.keys()
    for path, value in two.items():
        exact = path[-1] not in ("q", "q_bias")
        ours, theirs = np.asarray(one[path].get_value()), np.asarray(value.get_value())
        np.testing.assert_allclose(ours, theirs, rtol=0 if exact else 3e-7, err_msg=str(path))
    if name in COMPUTED:
        tokens = jnp.arange(9)[None]
        np.testing.assert_allclose(np.asarray(found(tokens).logits), np.asarray(expected(tokens).logits), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("llama_llama3", {}), ("qwen2", {"use_ocdbt": False})], ids=["zarr2", "folders"]
)
def test_unscanned_and_stored_otherwise(name: str, options: dict[str, bool], tmp_path: Path):
    folder = with_config(name, tmp_path / "model")
    flat = maxtext_params(GOLDEN / name, scan=False)
    write_orbax(tmp_path / "run" / "7" / "items", flat, optimizer=True, **options)
    (folder / "maxtext.json").write_text(json.dumps({"checkpoint": str(tmp_path / "run" / "7")}))
    assert_close(folder, name)


def test_a_mesh_gets_the_parameters_of_one_device(tmp_path: Path):
    folder = with_config("mixtral", tmp_path / "model")
    write_orbax(folder / "items", maxtext_params(GOLDEN / "mixtral"), use_zarr3=True)
    mesh = make_mesh(TeacherMeshConfig(fsdp=2, tensor=2, expert=2))
    assert_same_parameters(load_pretrained(folder, mesh=mesh), load_pretrained(folder))


def test_a_padded_vocabulary_and_bfloat16(tmp_path: Path):
    folder = with_config("llama_llama3", tmp_path / "model")
    flat = {n: v.astype(ml_dtypes.bfloat16) for n, v in maxtext_params(GOLDEN / "llama_llama3").items()}
    flat["token_embedder.embedding"] = np.pad(flat["token_embedder.embedding"], ((0, 5), (0, 0)))
    flat["decoder.logits_dense.kernel"] = np.pad(flat["decoder.logits_dense.kernel"], ((0, 0), (0, 5)))
    write_orbax(folder / "items", flat)
    found = load_pretrained(folder)
    assert found.embed[...].dtype == jnp.bfloat16
    assert found.embed[...].shape[0] == read_config(folder).vocab_size
    expected = load_pretrained(GOLDEN / "llama_llama3", dtype="bfloat16").embed[...]
    np.testing.assert_array_equal(found.embed[...], expected)


def test_the_notes_say_what_a_run_changed(tmp_path: Path):
    """Llama 3.1's numbers under a config of another RoPE, and queries that were not scaled."""
    name = "mistral_window"
    folder, flat = with_config(name, tmp_path / "model"), maxtext_params(GOLDEN / name)
    flat["decoder.layers.self_attention.query.kernel"] *= np.float32(np.sqrt(read_config(folder).head_dim))
    write_orbax(folder / "items", flat)
    digest = weights_digest(folder)
    (folder / "maxtext.json").write_text('{"queries": "plain"}')
    assert_close(folder, name)
    assert weights_digest(folder) != digest


def test_the_digest_is_of_the_values(tmp_path: Path):
    flat = maxtext_params(GOLDEN / "qwen3")
    digests = []
    for number, options in enumerate([{"use_zarr3": True}, {"use_ocdbt": False}]):
        folder = with_config("qwen3", tmp_path / f"model{number}")
        write_orbax(folder / "items", flat, **options)
        digests.append(weights_digest(folder))
    assert digests[0] == digests[1]
    flat["decoder.decoder_norm.scale"] = flat["decoder.decoder_norm.scale"] + np.float32(1e-6)
    write_orbax(with_config("qwen3", tmp_path / "other") / "items", flat)
    assert weights_digest(tmp_path / "other") != digests[0]


def refused(folder: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    for text in (*named, "next"):
        assert text in str(caught.value)


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path):
    flat = maxtext_params(GOLDEN / "qwen3")
    write_orbax(tmp_path / "bare" / "items", flat)
    refused(tmp_path / "bare", "config.json is missing", "maxtext.json")
    folder = with_config("qwen3", tmp_path / "named")
    (folder / "maxtext.json").write_text('{"checkpoint": "nowhere"}')
    refused(folder, "no Orbax checkpoint", "nowhere")
    (folder / "maxtext.json").write_text('{"checkpoints": 1}')
    refused(folder, "maxtext.json cannot be used", "checkpoints")
    shutil.copytree(tmp_path / "bare" / "items", folder / "items")
    (folder / "maxtext.json").unlink()
    for file in (folder / "items").glob("ocdbt.process_*/d/*"):
        file.write_bytes(file.read_bytes()[:100])
    refused(folder, "cannot be read")
    other = with_config("olmoe", tmp_path / "olmoe")
    write_orbax(other / "items", flat)
    refused(other, "is not supported", "olmoe", "to_huggingface")


def test_trees_that_do_not_fit_are_listed(tmp_path: Path):
    flat = maxtext_params(GOLDEN / "qwen3")
    del flat["decoder.layers.mlp.wo.kernel"]
    flat["decoder.layers.self_attention.lora"] = np.zeros((3, len(read_config(GOLDEN / "qwen3").kinds)), np.float32)
    folder = with_config("qwen3", tmp_path / "model")
    write_orbax(folder / "items", flat)
    refused(folder, "decoder.layers_0.mlp.wo.kernel", "decoder.layers_0.self_attention.lora")


@pytest.mark.slow
def test_in_a_bucket(gcs: Bucket, tmp_path: Path):
    folder = with_config("llama_llama3", tmp_path / "model")
    write_orbax(folder / "items", maxtext_params(GOLDEN / "llama_llama3"), use_zarr3=True)
    store = Store(f"{gcs.url}/model")
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        store.write(file.relative_to(folder).as_posix(), file.read_bytes())
    assert_same_parameters(load_pretrained(f"{gcs.url}/model"), load_pretrained(folder))
    assert weights_digest(f"{gcs.url}/model") == weights_digest(folder)
