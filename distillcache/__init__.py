"""Caches of a teacher's activations, and students trained against them.

The names below are what most programs need; everything else is at `distillcache.<folder>.<module>`. They are imported
when they are first used, so `import distillcache` costs nothing. Nothing is printed: messages and progress go to
loggers below `distillcache`.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillcache.cache_builder.build import build_cache
    from distillcache.cache_builder.prepare import prepare_rows
    from distillcache.models.checkpoint import load_pretrained, save_pretrained
    from distillcache.schemas.config import BuildConfig, PrepareConfig, TrainConfig
    from distillcache.schemas.errors import DistillcacheError
    from distillcache.tools.look.stored_rows import StoredRows
    from distillcache.trainer.feed import CacheSource, make_feed
    from distillcache.trainer.train import train

__all__ = [
    "BuildConfig",
    "CacheSource",
    "DistillcacheError",
    "PrepareConfig",
    "StoredRows",
    "TrainConfig",
    "build_cache",
    "load_pretrained",
    "make_feed",
    "prepare_rows",
    "save_pretrained",
    "train",
]

_HOMES = {
    "BuildConfig": "schemas.config",
    "CacheSource": "trainer.feed",
    "DistillcacheError": "schemas.errors",
    "PrepareConfig": "schemas.config",
    "StoredRows": "tools.look.stored_rows",
    "TrainConfig": "schemas.config",
    "build_cache": "cache_builder.build",
    "load_pretrained": "models.checkpoint",
    "make_feed": "trainer.feed",
    "prepare_rows": "cache_builder.prepare",
    "save_pretrained": "models.checkpoint",
    "train": "trainer.train",
}

# Silent until a program configures logging: without a handler Python would print warnings by itself.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# In a wheel the subpackages lie inside this folder, in a checkout beside it.
_FOLDER = Path(__file__).resolve().parent
if not (_FOLDER / "schemas").is_dir():
    __path__.append(str(_FOLDER.parent))


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
