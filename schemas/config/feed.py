"""Settings of how a training reads its cache."""

from pydantic import Field

from distillcache.schemas.base import Config


class LocalCacheConfig(Config):
    """A folder on a local disk, where what was read from a bucket is kept for the next epoch."""

    dir: str | None = Field(
        default=None, description="the folder, which all processes of a host may share; null: nothing is kept"
    )  # how much room there is, and where, only the user knows
    max_gib: float = Field(
        default=100.0, gt=0, description="size of everything in it, at most"
    )  # a fraction of the local disk that machines with accelerators usually have


class FeedConfig(Config):
    local_cache: LocalCacheConfig = Field(
        default=LocalCacheConfig(), description="what is read from a bucket, kept on a local disk"
    )
