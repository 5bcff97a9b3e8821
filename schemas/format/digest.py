"""The digest by which stored bytes are recognised: XXH3 with 128 bits, as 32 hexadecimal digits.

Not cryptographic: it finds damage, not forgery. It runs at memory speed, so that every byte can be covered.
"""

import numpy as np
import xxhash


def digest_bytes(data: bytes | bytearray | memoryview | np.ndarray) -> str:
    """The digest of these bytes; of an array, those of its elements (which must be C-contiguous)."""
    return xxhash.xxh3_128_hexdigest(data)  # pyright: ignore[reportArgumentType]  (an array is a buffer)
