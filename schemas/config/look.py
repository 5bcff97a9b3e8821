"""Settings of the commands that look at a cache's data: fidelity, diff, show, stats, export-samples."""

from pydantic import Field

from distillcache.schemas.base import Config, Count, Index, Mebibytes, Positive, Seed
from distillcache.schemas.config.storage import StorageConfig


class FidelityConfig(Config):
    """Compare a sample of a cache's rows with the live teacher. Exit code: 0 if faithful, 2 if not."""

    cache: str = Field(description="the cache, finished or not (then its committed shards are sampled)")
    teacher: str | None = Field(
        default=None, description="the teacher's checkpoint; default: where the plan says that it was"
    )
    rows: Positive = Field(
        default=16, description="rows to compare, drawn from as many shards as possible"
    )  # minutes on a CPU
    seed: Seed = Field(default=0, description="seed of the drawn rows")
    every_slot: bool = Field(default=False, description="list all slots of all taps, not only the wrong and the worst")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class DiffConfig(Config):
    """Compare two caches, or two runs. Exit code: 0 if nothing differs that affects the numbers, 2 otherwise."""

    a: str = Field(description="a cache or a run")
    b: str = Field(description="another cache or run")
    rows: Positive = Field(default=16, description="rows of two caches to compare")
    seed: Seed = Field(default=0, description="seed of the drawn rows")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class ShowConfig(Config):
    """Show a row of a cache: its text, documents and masks, and per-token activation statistics."""

    cache: str = Field(description="the cache, finished or not")
    row: Count = Field(default=0, description="row number, counted through the whole cache")
    block: Index | None = Field(
        default=None, description=("one block, token by token; default: all blocks side by side")
    )
    tokens: Positive = Field(default=64, description="tokens to list, one a line")  # a screen or two
    start: Index = Field(default=0, description="the first token to list")
    image: str | None = Field(
        default=None,
        pattern=r"\.(svg|png)$",
        description="also draw all tokens to this file: one block as lines, all as maps",
    )
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class StatsConfig(Config):
    """Compute statistics of a cache's numbers by tap, block and dimension, over some rows."""

    cache: str = Field(description="the cache, finished or not")
    rows: Positive = Field(default=32, description="rows to read, drawn from as many shards as possible")
    seed: Seed = Field(default=0, description="seed of the drawn rows")
    taps: list[str] | None = Field(default=None, description="which taps; default: all")
    blocks: list[Index] | None = Field(default=None, description="which slots of these taps; default: all")
    out: str | None = Field(
        default=None, pattern=r"\.npz$", description="also write per-dimension statistics to this file"
    )
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class ExportSamplesConfig(Config):
    """Write some rows of a cache with their decoded taps to a file, for notebooks and other programs."""

    cache: str = Field(description="the cache, finished or not")
    out: str = Field(pattern=r"\.(npz|safetensors)$", description="the file to write: a local path, gs:// or s3://")
    rows: list[Count] | None = Field(default=None, description="row numbers; default: drawn at random")
    count: Positive = Field(default=8, description="number of rows to draw")
    seed: Seed = Field(default=0, description="seed of the drawn rows")
    taps: list[str] | None = Field(default=None, description="which taps; default: all; []: only the rows")
    blocks: list[Index] | None = Field(default=None, description="which blocks; default: all")
    max_mib: Mebibytes = Field(default=2048, description="refuse to write a larger file")  # it is made in memory
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")
