"""Settings of `distillcache report`."""

from pydantic import Field

from distillcache.schemas.base import Config, Seed
from distillcache.schemas.config.storage import StorageConfig


class ReportConfig(Config):
    """Write one HTML file about a cache or a run, finished or not; it needs no network to be read."""

    target: str = Field(description="the cache or the run: a folder, gs://bucket/prefix or s3://bucket/prefix")
    out: str | None = Field(
        default=None,
        description="the file to write: a local path, gs:// or s3://; default: cache-report.html or run-report.html",
    )  # one for each kind, so that the report of a run does not replace that of its cache
    rows: int = Field(
        default=3,
        ge=0,
        le=64,
        description="for a cache: number of rows that are read and drawn; 1: with the text of its tokens; 0: none",
    )  # a few show the pattern, side by side; every row costs its bytes to read
    seed: Seed = Field(default=0, description="seed of the drawn rows")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")
