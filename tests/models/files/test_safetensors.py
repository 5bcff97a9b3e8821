"""Our writer of safetensors against the library's own."""

import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from distillcache.models.files.safetensors import TensorToWrite, write_safetensors
from tests.models.conftest import GOLDEN

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def written(tensors: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    made = {name: TensorToWrite(x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()}
    write_safetensors(stream, made, {"format": "pt"})
    return stream.getvalue()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 3), max_size=3)),
    )
)
def test_writes_the_bytes_of_the_library(wanted: dict[str, tuple[type, list[int]]]):
    numbers = np.random.default_rng(0)
    tensors = {name: numbers.standard_normal(shape).astype(dtype) for name, (dtype, shape) in wanted.items()}
    assert written({name: np.asarray(x) for name, x in tensors.items()}) == save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama_bias", "mixtral"])
def test_a_file_of_transformers_is_written_again_bit_by_bit(name: str):
    file = GOLDEN / name / "model.safetensors"
    assert written(load_file(file)) == file.read_bytes()
