"""The decoder against HF transformers: stored values (tests/golden/make_llama.py), and exports read back by it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import load_pretrained, save_pretrained
from models.surgery import SurgeryOp, apply_surgery
from tests.models.conftest import GOLDEN

NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "expected.safetensors").exists())

# Relative to the largest value. Two orders of summation in float32 differ by at most 1.3e-6 on these models.
TOLERANCE = 1e-5


def assert_close(found: object, expected: np.ndarray) -> None:
    assert np.shape(found) == expected.shape
    worst = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_golden_values(name: str):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    out = load_pretrained(GOLDEN / name, jnp.float32)(expected["tokens"], taps=("attn_out", "resid"))
    assert_close(out.logits, expected["logits"])
    assert_close(out.taps["attn_out"], expected["attn_out"])
    assert_close(out.taps["resid"], expected["resid"])


def test_every_golden_model_is_here():
    assert len(NAMES) == 7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_transformers_reads_our_export(name: str, cut: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    decoder = load_pretrained(GOLDEN / name, jnp.float32)
    if cut:
        decoder = apply_surgery(decoder, [SurgeryOp("kv_heads", 1)])
    save_pretrained(decoder, tmp_path / "export")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = load_file(GOLDEN / name / "expected.safetensors")["tokens"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert_close(decoder(tokens).logits, theirs)


@pytest.mark.slow
def test_demo_teacher_knows_rome(demo_teacher: Path):
    """A quantised file, its tokenizer and the forward pass at once: any of them wrong, and Rome is not next."""
    from models.tokenizer import load_tokenizer

    decoder, tokenizer = load_pretrained(demo_teacher), load_tokenizer(demo_teacher)
    ids = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    assert tokenizer.decode([int(decoder(jnp.array([ids])).logits[0, -1].argmax())]) == " Rome"
