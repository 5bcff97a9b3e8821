"""Settings of how a training reads its cache."""

from pydantic import Field

from distillcache.schemas.base import Config


class LocalCacheConfig(Config):
    """A folder on a local disk that keeps data of a bucket for the next epoch."""

    dir: str | None = Field(
        default=None, description="the folder; all processes of a host may share it; null: nothing is kept"
    )  # how much room there is, and where, only the user knows
    max_gib: float = Field(
        default=100.0, ge=1e-6, le=1e9, description="maximum total size"
    )  # a fraction of the local disk that machines with accelerators usually have


class FeedConfig(Config):
    local_cache: LocalCacheConfig = Field(
        default=LocalCacheConfig(), description="local disk cache for what is read from a bucket"
    )
