"""Credentials in URLs are refused before anything is written, and are repeated nowhere."""

from pathlib import Path

import pytest

from distillcache.schemas import command_line
from distillcache.schemas.config import BuildConfig, PrepareConfig, VerifyConfig
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.redaction import has_secret, redacted
from distillcache.schemas.store.store import Store, using
from distillcache.tools.cli import main

SECRETS = [
    "http://user:hush@host:9000",
    "https://hush@host/path",
    "http://us:er:hu/hush@host",
    "s3://AKIA:hush@bucket/cache",
    "s3://AKIA:hu/s+hush@bucket/cache",
    "gs://name:hush@bucket",
    "https://bucket.s3.amazonaws.com/key?x=1&X-Amz-Signature=hush&y=2",
    "https://storage.googleapis.com/b/k?X-Goog-Signature=hush",
    "https://account.blob.core.windows.net/c/k?sv=2020&sig=hush",
    "https://host/k?access_token=hush",
    "s3://bucket/key?AWSSecretAccessKey=hush",
    "file://user:hush@/folder",
]
PLAIN = [
    "gs://bucket/a@b/c:d",
    "s3://bucket/v1@2/x",
    "http://localhost:9000",
    "http://localhost:9000/path@1",
    "http://[::1]:9000",
    "https://host/k?versionId=3&page=2",
    "/local/user:name@host",
    "a b@c",
    "user@host:path",
    "",
]


@pytest.mark.parametrize("url", SECRETS)
def test_credentials_are_found_and_hidden(url: str) -> None:
    assert has_secret(url)
    assert "hush" not in redacted(f"a path {url} and more")
    assert redacted(redacted(url)) == redacted(url)


@pytest.mark.parametrize("url", PLAIN)
def test_other_urls_are_left_alone(url: str) -> None:
    assert redacted(url) == url


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize(
    "command",
    [
        ["build", "--storage.s3-endpoint", "{}"],
        ["build", "--cache={}"],
        ["build", "--nonsense", "{}"],
        ["prepare", "--data.path", "[a, '{}']"],
        ["verify", "{}"],
        ["train", "--run", "{}"],
        ["serve", "{}"],
        ["copy", "a", "{}"],
        ["export", "--out", "{}"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_no_command_takes_or_repeats_them(
    url: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(url) for word in command]) == 2
    told = "".join(capsys.readouterr())
    assert "contains credentials" in told
    assert "AWS_" in told
    assert "hush" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (BuildConfig, "storage: {{s3_endpoint: '{}'}}"),
        (PrepareConfig, "data: {{path: ['{}']}}"),
        (VerifyConfig, "cache: '{}'"),
    ],
)
def test_a_config_file_is_refused_alike(tmp_path: Path, model: type, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text.format(SECRETS[0]))
    with pytest.raises(ConfigError, match="contains credentials") as error:
        command_line.parse(model, ["--config", str(file)], "distillcache x")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "way",
    [
        Store,
        locate,
        lambda url: using(StorageConfig(s3_endpoint=url)).__enter__(),
        lambda url: Store("s3://bucket/place", StorageConfig(s3_endpoint=url)),
    ],
    ids=["store", "locate", "using", "settings"],
)
def test_the_library_refuses_them(way) -> None:
    with pytest.raises(ConfigError, match="contains credentials") as error:
        way(SECRETS[0].replace("http", "s3"))
    assert "hush" not in str(error.value)


def test_the_environments_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", SECRETS[0])
    with pytest.raises(ConfigError, match="contains credentials"):
        Store("s3://bucket/place")


def test_what_an_older_plan_holds_is_hidden_in_messages() -> None:
    error = InputError("this cache differs", {"s3_endpoint": f"there '{SECRETS[0]}', here None"})
    assert "hush" not in str(error)
    assert "host:9000" in str(error)
