"""The norm's two products with its weight, each against NumPy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from distillcache.models.config import NormProduct
from distillcache.models.layers.norm import rms_norm, softcap

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("product", ["wide", "offset"])
def test_rms_norm(product: NormProduct, dtype: type):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 64)).astype(dtype), rng.normal(size=64).astype(dtype)
    wide = x.astype(np.float64) / np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True) + 1e-5)
    factor = weight.astype(np.float64) + (product == "offset")
    expected = (wide * factor).astype(np.float32).astype(dtype).astype(np.float64)
    found = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5, product=product))
    assert found.dtype == dtype
    # Rounding may go the other way where float32 and float64 differ: one step of the dtype in some of 320 numbers.
    step = np.finfo(np.float32).eps if dtype is np.float32 else 2.0**-7
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=4 * step if dtype is np.float32 else step)
    if dtype is BF16:
        assert np.mean(found.astype(np.float64) == expected) > 0.99


def test_softcap_is_nearly_linear_and_bounded():
    x = jnp.asarray([0.0, 0.1, -0.1, 1e6, -1e6])
    np.testing.assert_allclose(softcap(x, 30.0), [0.0, 0.1, -0.1, 30.0, -30.0], rtol=1e-5)
