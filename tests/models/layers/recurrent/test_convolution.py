"""The short convolution against NumPy, token by token, in packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.layers.recurrent.convolution import causal_convolution, document_runs


def test_runs_begin_where_the_segment_changes():
    ids = jnp.asarray([[1, 1, 2, 3, 3, 0, 0], [0, 0, 1, 1, 0, 1, 1]])
    np.testing.assert_array_equal(document_runs(ids), [[0, 0, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 3, 3]])


@pytest.mark.parametrize("taps", [1, 2, 4, 9])
def test_sums_of_a_channels_last_numbers_in_its_document(taps: int):
    """Rows shorter than the taps, too."""
    rng = np.random.default_rng(0)
    ids = np.asarray([[1, 1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1]])
    x, weight = rng.normal(size=(2, 7, 3, 2)), rng.normal(size=(3, 2, taps))
    expected = np.zeros_like(x)
    for row, token in np.ndindex(2, 7):
        for tap in range(taps):
            at = token - (taps - 1 - tap)
            if at >= 0 and ids[row, at] == ids[row, token]:
                expected[row, token] += weight[..., tap] * x[row, at]
    found = causal_convolution(jnp.float32(x), jnp.float32(weight), document_runs(jnp.asarray(ids)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
