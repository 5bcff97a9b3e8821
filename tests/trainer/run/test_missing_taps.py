"""What a cache lacks: the advice helps in an online run, too, where nothing is added to a cache."""

import re
from pathlib import Path

import pytest

import distillcache
from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.config.train import TrainConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.importance import teacher_importance
from tests.conftest import build_config

ROOT = Path(distillcache.__file__).parents[1]
FILES = [*(ROOT / "trainer").rglob("*.py"), ROOT / "schemas" / "cache" / "addressing.py"]


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    from distillcache.cache_builder.build import build_cache

    spec: BuildConfig = build_config(tmp_path_factory.mktemp("cache") / "two", teacher, corpus, blocks=[0, 1])
    build_cache(spec)
    return Path(spec.cache)


def test_importance_says_what_to_do_online(tmp_path: Path, two_blocks: Path, teacher: Path) -> None:
    config = TrainConfig.model_validate({"run": str(tmp_path / "run"), "cache": str(two_blocks), "source": "online"})
    with pytest.raises(ConfigError, match="lacks some") as caught:
        teacher_importance(Store(str(tmp_path / "run")), load_pretrained(teacher), 4, Sources(config).open)
    assert "online.taps" in caught.value.next
    whole = config.model_copy(update={"online": config.online.model_validate({"taps": {}})})
    teacher_importance(Store(str(tmp_path / "run")), load_pretrained(teacher), 4, Sources(whole).open)


def test_every_advice_to_extend_names_what_an_online_run_does() -> None:
    """As text: most of these errors need caches of their own."""
    without = [
        f"{file.relative_to(ROOT)}: {found}"
        for file in FILES
        for found in re.findall(r"distillcache build --extend.*", re.sub(r'"\n +f?"', "", file.read_text()))
        if "online" not in found and "{flag}" not in found
    ]
    assert without == []
