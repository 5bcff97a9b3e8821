"""Programs that a benchmark needs several times, compiled once: training two students alike takes two trainers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

# Every program, whatever its size and however short it took to compile.
SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """JAX's persistent compilation cache lies in this folder inside, unless the caller's environment names one."""
    name = "jax_compilation_cache_dir"
    before = {each: getattr(jax.config, each) for each in (name, *SETTINGS)}
    if before[name]:
        yield
        return
    try:
        for each, value in {name: str(folder), **SETTINGS}.items():
            jax.config.update(each, value)
        yield
    finally:
        for each, value in before.items():
            jax.config.update(each, value)
