"""GGUF files, written here by `gguf.GGUFWriter` from HF checkpoints, against the load of those checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.config import (
    BlockKind,
    LayerGroup,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    ShortConvConfig,
    TemperatureConfig,
    plan_layers,
)
from distillcache.models.decoder import Decoder
from distillcache.models.files.gguf.file import GgufSource, open_gguf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN, randomized
from tests.models.test_checkpoint import assert_same_parameters
from tests.rounding import assert_rounded

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "operator_norm": "attn_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "feed_forward.gate": "ffn_gate_inp",
}
EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}


PERMUTED = ("llama", "mistral3", "granite", "granitemoe")


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: row 2i of a head is the first half's row i, row 2i + 1 the second half's (llama.cpp's `permute`)."""
    width = len(weights) // heads
    order = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weights[order]


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    experts = {} if moe is None else {"expert_count": moe.num_experts, "expert_used_count": moe.top_k}
    if moe is not None and config.family != "mixtral":
        experts |= {"expert_feed_forward_length": moe.expert_size}
        experts |= {"expert_shared_feed_forward_length": moe.shared_size} if moe.shared_size else {}
    return experts | {
        "block_count": config.num_blocks,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope.theta,
        "vocab_size": config.vocab_size,
    }


def tensors_of(checkpoint: Path, config: ModelConfig, permute: bool) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint under its GGUF name; those of a block's experts stacked."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if permute else {}
    found: dict[str, Any] = {}
    for name, stored in load_file(checkpoint / "model.safetensors").items():
        stem, part = name.rsplit(".", 1)
        values = stored.astype(np.float32)
        if config.norm_product == "offset" and stem.endswith("norm"):
            values = values + 1
        if stem in TOP:
            found[f"{TOP[stem]}.{part}"] = values
            continue
        _, _, layer, inner = stem.split(".", 3)
        if part == "expert_bias":
            found[f"blk.{layer}.exp_probs_b.bias"] = values
            continue
        if inner.endswith("input_linear"):
            for half, into in enumerate(("ffn_gate_exps", "ffn_up_exps")):
                found[f"blk.{layer}.{into}.{part}"] = np.split(values, 2, axis=1)[half]
            continue
        values = values.squeeze(1) if inner == "conv.conv" else values
        if config.family == "seed_oss" and inner == "post_attention_layernorm":
            found[f"blk.{layer}.post_attention_norm.{part}"] = values
            continue
        if ".experts." in inner:
            _, number, projection = inner.rsplit(".", 2)
            found.setdefault(f"blk.{layer}.{EXPERTS[projection]}.{part}", {})[int(number)] = values
            continue
        values = permuted(values, heads[BLOCK[inner]]) if BLOCK[inner] in heads else values
        found[f"blk.{layer}.{BLOCK[inner]}.{part}"] = values[0] if inner.endswith("expert_gate") else values
    stacked = {name: [each[at] for at in sorted(each)] for name, each in found.items() if isinstance(each, dict)}
    return found | {name: np.stack(each) for name, each in stacked.items()}


def write_gguf(
    checkpoint: Path,
    target: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    raw: dict[gguf.GGMLQuantizationType, dict[str, np.ndarray]] | None = None,
    **split: Any,
) -> Path:
    """A checkpoint as llama.cpp's converter would write it; a change of None removes a key, and `raw` are tensors in
    the place of the checkpoint's own, as they are stored. split: see GGUFWriter."""
    config = read_config(checkpoint)
    writer = gguf.GGUFWriter(target, architecture, **split)
    add: dict[type, Callable[..., None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    for key, value in (metadata_of(config) | (changes or {})).items():
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    stored = {name: (values, quant) for quant, of_kind in (raw or {}).items() for name, values in of_kind.items()}
    for name, values in tensors_of(checkpoint, config, architecture in PERMUTED).items():
        if name in stored:
            writer.add_tensor(name, stored[name][0], raw_dtype=stored[name][1])
        elif values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def refused(path: Path | str, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    for text in (Path(path).name, *named, "next"):
        assert text in str(caught.value)


@pytest.mark.bits
@pytest.mark.parametrize("name", ["llama_tied", "llama_linear"])
def test_equals_the_load_of_the_hf_directory(name: str, tmp_path: Path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0} if name == "llama_linear" else {}
    path = write_gguf(GOLDEN / name, tmp_path / "model.gguf", changes=linear)
    expected, found = load_pretrained(GOLDEN / name, "float32"), load_pretrained(path)
    # The file does not say which activation: llama is silu for llama.cpp.
    assert found.config.rope == expected.config.rope
    tokens = jnp.asarray(load_file(GOLDEN / name / "expected.safetensors")["tokens"])
    out, theirs = (x(tokens, taps=("attn_out",)) for x in (found, expected))
    assert_rounded(out.taps["attn_out"][0], theirs.taps["attn_out"][0])
    if expected.config.activation == "silu":  # one config, one program
        assert found.config == expected.config
        np.testing.assert_array_equal(out.logits, theirs.logits)


MOE = MoeConfig(num_experts=5, top_k=2, expert_size=14)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"qkv_bias": True, "tie_embeddings": True}),
    "qwen3": ("qwen3", {"qk_norm": "head"}),
    "seed_oss": ("seed_oss", {"qkv_bias": True}),
    "ernie4_5": ("ernie4_5", {"rope": RopeConfig(interleaved=True), "tie_embeddings": True}),
    "hunyuan_v1_dense": ("hunyuan-dense", {"qk_norm": "turned"}),
    "mixtral": ("llama", {"moe": replace(MOE, expert_size=40)}),
    "qwen2_moe": (
        "qwen2moe",
        {"qkv_bias": True, "moe": replace(MOE, shared_size=22, shared_gate=True, renormalise=False)},
    ),
    "qwen3_moe": ("qwen3moe", {"qk_norm": "head", "moe": MOE}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_equal_the_load_of_the_hf_directory(family: str, tiny_config: ModelConfig, tmp_path: Path):
    architecture, changes = FAMILIES[family]
    layers = (LayerGroup((BlockKind(moe="moe" in changes),), 2),)
    config = replace(tiny_config, family=family, layers=layers, **changes)
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", architecture=architecture)
    found, expected = load_pretrained(path), load_pretrained(tmp_path / "hf")
    assert found.config == expected.config == config
    assert_same_parameters(found, expected)


def test_the_text_model_of_a_vision_language_model(tiny_config: ModelConfig, tmp_path: Path):
    """Its keys about pictures say nothing of text; of another architecture they are refused."""
    save_pretrained(randomized(Decoder(replace(tiny_config, family="qwen3", qk_norm="head"))), tmp_path / "hf")
    keys = {"rope.dimension_sections": [24, 20, 20, 0], "n_deepstack_layers": 3}
    path = write_gguf(tmp_path / "hf", tmp_path / "vl.gguf", architecture="qwen3vl", changes=keys)
    found, expected = load_pretrained(path), load_pretrained(tmp_path / "hf")
    assert found.config == expected.config
    assert_same_parameters(found, expected)
    refused(
        write_gguf(tmp_path / "hf", tmp_path / "plain.gguf", architecture="qwen3", changes=keys), "dimension_sections"
    )


def test_queries_that_grow(tiny_config: ModelConfig, tmp_path: Path):
    """As llama.cpp has Ministral 3; of another architecture the keys are refused."""
    rope = RopeConfig(1e4, "yarn", 4.0, 16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.5)
    growth = TemperatureConfig(0.25, 16.0, first=0, everywhere=True)
    config = replace(tiny_config, family="ministral3", rope=rope, temperature=growth)
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    scaling |= {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_log_multiplier": 0.5}
    keys = scaling | {"attention.temperature_scale": 0.25}
    path = write_gguf(tmp_path / "hf", tmp_path / "m.gguf", architecture="mistral3", changes=keys)
    found, expected = load_pretrained(path), load_pretrained(tmp_path / "hf")
    assert found.config == expected.config == config
    assert_same_parameters(found, expected)
    assert read_config(write_gguf(tmp_path / "hf", tmp_path / "n.gguf", architecture="mistral3")).temperature is None
    refused(write_gguf(tmp_path / "hf", tmp_path / "plain.gguf", changes=keys), "yarn_beta_fast")


@pytest.mark.parametrize("family", ["granite", "granitemoe"])
def test_granite(family: str, tiny_config: ModelConfig, tmp_path: Path):
    """Its multipliers have keys; experts lie together in HF's files. Without a key attention has the usual factor."""
    moe = MOE if family == "granitemoe" else None
    scales = {"embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.0078125, "logits_divisor": 6.0}
    layers = (LayerGroup((BlockKind(moe=moe is not None),), 2),)
    config = replace(tiny_config, family=family, layers=layers, moe=moe, intermediate_size=14, **scales)
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    keys = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0078125, "logit_scale": 6.0}
    path = write_gguf(tmp_path / "hf", tmp_path / "m.gguf", architecture=family, changes=keys)
    found, expected = load_pretrained(path), load_pretrained(tmp_path / "hf")
    assert found.config == expected.config == config
    assert_same_parameters(found, expected)
    plain = read_config(write_gguf(tmp_path / "hf", tmp_path / "n.gguf", architecture=family))
    assert (plain.attention_scale, plain.embed_scale, plain.logits_divisor) == (None, 1.0, 1.0)


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_short_convolutions(family: str, tiny_config: ModelConfig, tmp_path: Path):
    """Numbers of key/value heads say which blocks have none; the first block is dense."""
    conv, sparse = BlockKind(mixer="short_conv"), family == "lfm2_moe"
    moe = replace(MOE, scores="sigmoid", bias=True, native_bias=True, sum_eps=1e-6)
    config = replace(
        tiny_config,
        family=family,
        layers=plan_layers([conv, replace(conv, moe=sparse), BlockKind(moe=sparse)]),
        moe=moe if sparse else None,
        short_conv=ShortConvConfig(channels=36, taps=3),
        qk_norm="head",
        tie_embeddings=True,
    )
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    keys: dict[str, Any] = {"attention.head_count_kv": [0, 0, 2], "shortconv.l_cache": 3}
    keys |= {"leading_dense_block_count": 1, "expert_gating_func": 2} if sparse else {}
    architecture = family.replace("_", "")
    path = write_gguf(tmp_path / "hf", tmp_path / "m.gguf", architecture=architecture, changes=keys)
    found, expected = load_pretrained(path), load_pretrained(tmp_path / "hf")
    assert found.config == expected.config == config
    assert_same_parameters(found, expected)
    keys |= {"expert_gating_func": 1} if sparse else {"attention.head_count_kv": [0, 1, 2]}
    path = write_gguf(tmp_path / "hf", tmp_path / "n.gguf", architecture=architecture, changes=keys)
    refused(path, "expert_gating_func" if sparse else "head_count_kv")


def test_gemma(tiny_config: ModelConfig, tmp_path: Path):
    """Its norms are stored as whole factors: adding one and taking it away rounds."""
    own: dict[str, Any] = {"norm_product": "offset", "embed_scale": 6.0, "embed_scale_rounded": True}
    own |= {"activation": "gelu_tanh", "tie_embeddings": True, "family": "gemma"}
    config = replace(tiny_config, **own)
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    found = load_pretrained(write_gguf(tmp_path / "hf", tmp_path / "m.gguf", architecture="gemma"))
    expected = load_pretrained(tmp_path / "hf")
    assert found.config == expected.config == config
    np.testing.assert_allclose(found.final_norm[...], expected.final_norm[...], rtol=0, atol=2e-7)
    tokens = jnp.arange(13)[None]
    np.testing.assert_allclose(found(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-4)


def test_yarn_as_qwen_files_have_it(tiny_config: ModelConfig, tmp_path: Path):
    save_pretrained(Decoder(replace(tiny_config, family="qwen2", qkv_bias=True)), tmp_path / "hf")
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", changes=scaling, architecture="qwen2")
    assert read_config(path).rope == RopeConfig(kind="yarn", factor=4.0, original_max_positions=16)


# Every type that the package turns into float32, those that it cannot make itself among them.
RAW = [kind.name for kind in gguf.GGML_QUANT_SIZES if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", RAW)
def test_blocks_of_every_quantisation(kind: str, wide_qwen: Path, tmp_path: Path):
    """Bytes at random, as one parameter and as the experts' stacked ones, against the package's own function."""
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    written = tensors_of(wide_qwen, read_config(wide_qwen), permute=False)
    raw = {
        name: rng.integers(0, 256, (*written[name].shape[:-1], written[name].shape[-1] // block * size), np.uint8)
        for name in ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight")
    }
    path = write_gguf(wide_qwen, tmp_path / "model.gguf", architecture="qwen3moe", raw={quant: raw})
    config = read_config(path)
    source = GgufSource(open_gguf(path), config, path)
    with np.errstate(all="ignore"):
        q, up = (gguf.dequantize(values, quant) for values in raw.values())
        found = source.read("model.layers.0.self_attn.q_proj.weight")
        np.testing.assert_array_equal(found, q)
        for expert in range(config.moe_config.num_experts):
            name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
            np.testing.assert_array_equal(source.read(name), up[expert])
            box = (slice(1, 3), slice(0, 5))
            np.testing.assert_array_equal(source.read(name, box), up[expert][box])
    assert source.dtypes["model.layers.0.self_attn.q_proj.weight"] == ("BF16" if kind == "BF16" else "F32")


@pytest.fixture(scope="module")
def wide_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows are whole quantisation blocks of 256."""
    config = ModelConfig(
        vocab_size=7,
        hidden_size=256,
        intermediate_size=6,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        layers=(LayerGroup((BlockKind(moe=True),), 1),),
        qk_norm="head",
        moe=MoeConfig(num_experts=3, top_k=2, expert_size=5),
        family="qwen3_moe",
    )
    folder = tmp_path_factory.mktemp("wide") / "qwen"
    save_pretrained(Decoder(config), folder)
    return folder


def parts_of(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf"))


@pytest.mark.parametrize("first_empty", [False, True])
def test_a_model_in_parts(first_empty: bool, tmp_path: Path):
    split = {"split_max_tensors": 9, "small_first_shard": first_empty}
    write_gguf(GOLDEN / "llama_llama3", tmp_path / "model.gguf", **split)
    parts, whole = parts_of(tmp_path / "model.gguf"), write_gguf(GOLDEN / "llama_llama3", tmp_path / "whole.gguf")
    assert len(parts) == 4 + first_empty
    assert read_config(parts[0]) == read_config(whole)
    assert_same_parameters(load_pretrained(parts[0]), load_pretrained(whole))
    digest = weights_digest(parts[0])
    refused(parts[1], "name the first part", f"-00001-of-{len(parts):05}")
    content = parts[-1].read_bytes()
    parts[-1].write_bytes(content[:-40] + bytes(40))
    assert weights_digest(parts[0]) != digest
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=f"part 1 of {len(parts)}"):
        load_pretrained(parts[0])
    parts[2].unlink()
    refused(parts[0], parts[2].name, "missing")
    parts[0].rename(tmp_path / "other.gguf")
    refused(tmp_path / "other.gguf", "name the first part")


def test_types_that_cannot_be_dequantised_are_named(wide_qwen: Path, tmp_path: Path):
    quant = gguf.GGMLQuantizationType.Q8_K
    size = gguf.GGML_QUANT_SIZES[quant][1]
    raw = {quant: {"blk.0.attn_q.weight": np.zeros((8, size), np.uint8)}}
    refused(write_gguf(wide_qwen, tmp_path / "model.gguf", architecture="qwen3moe", raw=raw), "Q8_K", "attn_q")


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("qwen2", {}, "qwen2.expert_count"),
        ("qwen3moe", {"expert_count": 0}, "qwen3moe.expert_count"),
        ("qwen3moe", {"expert_weights_norm": False}, "expert_weights_norm"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func"),
        ("qwen3moe", {"expert_used_count": None}, "expert_used_count"),
        ("qwen3moe", {"attention.sliding_window": 7}, "attention.sliding_window"),
    ],
)
def test_refusals_of_files_with_experts(
    architecture: str, changes: dict[str, Any], named: str, wide_qwen: Path, tmp_path: Path
):
    refused(write_gguf(wide_qwen, tmp_path / "model.gguf", architecture=architecture, changes=changes), named)


def test_biases_are_read_and_unpermuted(tmp_path: Path):
    found = load_pretrained(write_gguf(GOLDEN / "llama_bias", tmp_path / "model.gguf"))
    expected = load_pretrained(GOLDEN / "llama_bias")
    assert found.config.qkv_bias
    assert found.config.mlp_bias
    one, two = (x.groups[0].blocks[0].attention for x in (found, expected))
    np.testing.assert_array_equal(one.q_bias[...], two.q_bias[...])
    np.testing.assert_array_equal(one.k_bias[...], two.k_bias[...])


@pytest.fixture
def wide(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    """A checkpoint whose rows are whole quantisation blocks of 32."""
    decoder = Decoder(replace(tiny_config, hidden_size=64, num_heads=4, intermediate_size=96, head_dim=16))
    save_pretrained(decoder, tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_1", 0.2), ("F16", 1e-3), ("BF16", 1e-2)])
def test_quantised_tensors_are_near_their_source(kind: str, error: float, wide: Path, tmp_path: Path):
    path = write_gguf(wide, tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType[kind])
    found, expected = load_pretrained(path), load_pretrained(wide)
    assert found.embed[...].dtype == jnp.float32  # norms are float32 in every GGUF
    for name in ("q", "k", "v", "o"):
        one, two = (np.asarray(getattr(x.groups[0].blocks[0].attention, name)[...]) for x in (found, expected))
        assert 0 < np.abs(one - two).max() < error * np.abs(two).max()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors_are_recognised(factor: float, tmp_path: Path):
    theta, half = 500000.0, 4
    # Source: llama.cpp's `generate_extra_tensors`.
    divisors = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    changes = {"rope.freq_base": theta}
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", changes=changes, extra=extra)
    assert read_config(path).rope == RopeConfig(theta, "llama3", factor, 8192)
    extra = {"rope_freqs.weight": np.array(divisors, np.float32) * 1.5}
    refused(write_gguf(GOLDEN / "llama_linear", path, changes=changes, extra=extra), "rope_freqs.weight")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "llama.new_trick"),
        ({"expert_weights_norm": False}, "llama.expert_weights_norm"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"attention.head_count_kv": [2, 2, 1]}, "llama.attention.head_count_kv"),
        ({"block_count": None}, "llama.block_count"),
        ({"block_count": 2}, "model.layers.2"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str, tmp_path: Path):
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", changes=changes), named)


def test_other_architectures_and_unknown_tensors(tmp_path: Path):
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "a.gguf", architecture="phi2"), "phi2")
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    refused(write_gguf(GOLDEN / "llama_linear", tmp_path / "b.gguf", extra=extra), "blk.0.attn_q_norm.weight")


def test_damaged_files(tmp_path: Path):
    path = write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf")
    digest, content = weights_digest(path), path.read_bytes()
    for kept in (4, 30, 500, len(content) // 2, len(content) - 100):  # the last bytes may be padding
        path.write_bytes(content[:kept])
        refused(path, "truncated")
    path.write_bytes(b"\0" * 100)
    refused(path, "not a GGUF file")
    path.write_bytes(b"")
    refused(path, "not a GGUF file")
    path.write_bytes(content)
    assert weights_digest(path) == digest
