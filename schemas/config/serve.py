"""Settings of `distillcache serve`."""

from pydantic import Field

from distillcache.schemas.base import Config
from distillcache.schemas.config.storage import StorageConfig


class ServeConfig(Config):
    """Show a cache or a run in the browser: rows, tokens, blocks, search, and live while it is built or trained."""

    target: str = Field(description="the cache or the run: a folder, gs://bucket/prefix or s3://bucket/prefix")
    host: str = Field(
        default="127.0.0.1", description="address to listen on; one that other machines can reach needs --expose"
    )  # rows may be private text
    port: int = Field(default=8321, ge=0, le=65535, description="port to listen on; 0: any free port")
    expose: bool = Field(
        default=False,
        description="let other machines read everything that the cache or run holds: there is no password",
    )
    names: list[str] = Field(
        default=[],
        description="further host names that browsers may use, such as a proxy's; all others are refused",
    )  # a foreign page could otherwise make its own name point here and read along (DNS rebinding)
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")
