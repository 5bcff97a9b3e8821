"""Object-store client settings: request sizes, retries, rates. Every default has its reason beside it."""

from typing import Annotated

from pydantic import Field

from distillcache.schemas.base import Config, Positive, Seconds, WholeSeconds

RequestRate = Annotated[float, Field(ge=1e-3, le=1e9)]  # more seldom, a command would seem to hang


class StorageConfig(Config):
    """Settings for `gs://` and `s3://`; local disks need none. Credentials never belong here: each store has its own
    rules for them.
    """

    request_concurrency: Annotated[int, Field(gt=0, le=4096)] = Field(
        default=32, description="concurrent requests to a bucket in this process"
    )  # some 2 GB/s at 60 MB/s a stream; more only costs memory, unless the network is faster
    max_retries: Positive = Field(
        default=32,
        description="retries of a request after a temporary failure (429, 5xx, no connection)",
    )  # with the two below: an outage of a quarter of an hour is sat out
    first_delay_s: Seconds = Field(
        default=0.25, description="delay before the first retry; it doubles with each further one"
    )  # most failures are over at once
    max_delay_s: Seconds = Field(
        default=32.0, description="maximum delay between two retries"
    )  # what the stores' own clients take
    stall_timeout_s: WholeSeconds = Field(
        default=60, description="a request without progress for this long is cancelled and retried"
    )  # stores answer within seconds; a connection that died without a word never does
    contact_timeout_s: Seconds = Field(
        default=20.0,
        description="total time limit of the first request to a bucket",
    )  # a wrong endpoint or missing credentials must not look like a hang
    read_rate: RequestRate | None = Field(
        default=1000.0, description="initial limit of reads a second in this process; null: none"
    )  # a new bucket of GCS serves about 5,000 a second, shared by all processes
    write_rate: RequestRate | None = Field(
        default=200.0, description="initial limit of writes a second in this process; null: none"
    )  # likewise about 1,000; objects are large, so no build comes near
    rate_doubling_s: Seconds = Field(
        default=1200.0, description="time in which the two limits double"
    )  # GCS asks for no faster ramp than double in 20 minutes, so that it can spread the keys
    s3_endpoint: str | None = Field(
        default=None,
        description="URL of an S3 store other than Amazon's; default: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL",
    )
    s3_region: str | None = Field(
        default=None,
        description="region of s3_endpoint; default: AWS_REGION or AWS_DEFAULT_REGION, else "
        "us-east-1; Amazon's own buckets need none",
    )
