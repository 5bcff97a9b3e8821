"""What users name for a checkpoint and is none: each is told what it is, and what helps."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.errors import CheckpointError, DistillcacheError, InputError
from tests.cache_builder.text.test_chat import chat_tokenizer
from tests.models.conftest import GOLDEN, upload
from tests.models.files.gguf.test_file import parts_of, write_gguf
from tests.models.test_checkpoint import refused
from tests.servers.fixtures import Bucket

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model"))


@pytest.mark.parametrize(
    ("packing", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, "GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
        ({"quant_method": "new-method"}, "new-method"),
        ({"quant_algo": "FP8"}, "in a way that quantization_config does not name"),
        ({"quant_method": None, "bits": 3}, "does not name"),
    ],
)
def test_quantised_weights_are_told_what_helps(saved: Path, packing: dict[str, Any], named: str):
    change(saved, quantization_config=packing)
    text = message(saved)
    assert "is quantised" in text
    assert named in text
    assert "the original, in bfloat16" in text
    assert "remove the key" not in text


def test_weights_that_mlx_quantised(saved: Path):
    change(saved, quantization={"group_size": 64, "bits": 4})
    assert "is quantised (MLX)" in message(saved)


def test_weights_that_compressed_tensors_quantised_of_old(saved: Path):
    change(saved, compression_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    assert "is quantised (compressed-tensors)" in message(saved)


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("prefix", "extra", "step"),
    [
        ("", [f"{Q}lora_A.weight", f"{Q}lora_B.weight"], "merge_and_unload()"),
        ("base_model.model.", [f"base_model.model.{Q}lora_A.default.weight"], "merge_and_unload()"),
        ("", [f"{Q}qweight", f"{Q}scales"], "these weights are quantised"),
        ("", [f"{Q}weight_scale"], "these weights are quantised"),
        ("", [f"{Q}weight.absmax"], "these weights are quantised"),
        ("module.", [], "the names begin with module., "),
        ("_orig_mod.", [], "the names begin with _orig_mod., "),
        ("language_model.", [], "the names begin with language_model., "),
        (None, [], "save it with AutoModelForCausalLM"),
        ("", ["v_head.weight"], "check that config.json belongs"),
    ],
)
def test_tensors_of_other_names_are_told_what_helps(saved: Path, prefix: str | None, extra: list[str], step: str):
    tensors = load_file(saved / "model.safetensors")
    named = {
        name.removeprefix("model.") if prefix is None else f"{prefix}{name}": value for name, value in tensors.items()
    }
    save_file(named | {name: np.ones(2, np.float32) for name in extra}, saved / "model.safetensors")
    refused(saved, "are not those of its config", step)


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def message(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["adapter_config.json", "adapter_model.safetensors", "config.json"], "merge_and_unload"),
        (["models--a--b/refs/main"], "models--OWNER--NAME/snapshots/COMMIT"),
        (["blobs/ab", "refs/main", "snapshots/0123/config.json"], "snapshots/0123"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "in the format of the model's makers"),
        (["params.json", "consolidated.00.pth"], "in the format of the model's makers"),
        (["config.json", "consolidated.safetensors"], "in the format of the model's makers"),
        (["config.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (["config.json", "model-00001-of-00002.safetensors"], "and 1 of 2 shards, such as model-00002-of-00002"),
        (["config.json", "model-1-of-1.safetensors"], "which lists the shards, from the model's folder\n"),
        (["snapshots/0123/config.json", "snapshots/0123/x"], "snapshots/0123"),
        (["config.json", "model.fp16.safetensors"], "rename model.fp16.safetensors to model.safetensors"),
        (["config.json", "weights.safetensors"], "rename weights.safetensors to model.safetensors if it holds all"),
    ],
)
def test_folders_of_another_kind(files: list[str], named: str, tmp_path: Path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((GOLDEN / "llama_tied/config.json").read_bytes() if "config" in name else b"{}")
    assert named in f"{message(tmp_path)}\n"


@pytest.mark.parametrize(
    ("dtype", "step"), [("float64", "save it again in float32"), ("int64", "save it again"), ("int8", "not quantised")]
)
def test_numbers_of_another_dtype_are_told_what_helps(saved: Path, dtype: str, step: str):
    tensors = load_file(saved / "model.safetensors")
    save_file(
        tensors | {name: tensors[name].astype(dtype) for name in tensors if "norm" in name}, saved / "model.safetensors"
    )
    refused(saved, "dtype that is not supported", step)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pointers_of_git_lfs(saved: Path, name: str):
    (saved / name).write_bytes(POINTER)
    refused(saved, name, "git lfs pull")


def test_a_gguf_that_is_a_pointer(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(POINTER)
    refused(tmp_path / "a.gguf", "git lfs pull")


def test_the_name_of_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B")
    refused("gpt2", "hf download gpt2 ")
    with pytest.raises(InputError, match="no such tokenizer") as caught:
        load_tokenizer("Qwen/Qwen3-0.6B")
    assert "hf download Qwen/Qwen3-0.6B" in str(caught.value)
    (tmp_path / "Qwen").mkdir()
    assert "hf download" not in message("Qwen/Qwen3-0.6B")


def test_one_part_of_a_split_gguf(tmp_path: Path):
    write_gguf(GOLDEN / "llama_linear", tmp_path / "model.gguf", split_max_tensors=12)
    first, second, _ = parts_of(tmp_path / "model.gguf")
    refused(second, "name the first part", first.name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "a.gguf"])
def test_pointers_of_git_lfs_in_buckets(saved: Path, gcs: Bucket, name: str):
    (saved / name).write_bytes(POINTER)
    url = upload(saved, f"{gcs.url}/{name}")
    refused(f"{url}/{name}" if name == "a.gguf" else url, name, "git lfs pull")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("far", [False, True], ids=["local", "bucket"])
def test_files_of_a_tokenizer_that_are_pointers(far: bool, name: str, tmp_path: Path, request: pytest.FixtureRequest):
    chat_tokenizer(tmp_path / "t", "{{ messages }}")
    (tmp_path / "t" / name).write_bytes(POINTER)
    path = upload(tmp_path / "t", f"{request.getfixturevalue('gcs').url}/t") if far else str(tmp_path / "t")
    with pytest.raises(DistillcacheError, match="git lfs pull") as caught:
        load_tokenizer(path)
    assert name in str(caught.value)
