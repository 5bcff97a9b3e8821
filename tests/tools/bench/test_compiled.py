"""Programs compiled once in a benchmark: what it needs twice lies in its folder, and the caller's settings stay."""

import os
import subprocess
from pathlib import Path

import jax
import pytest

from distillcache.schemas.runtime.child_python import python_environment, python_words
from distillcache.tools.bench.compiled import SETTINGS, compiled_once

NAME = "jax_compilation_cache_dir"


def test_settings_are_restored(tmp_path: Path) -> None:
    kept = {name: getattr(jax.config, name) for name in (NAME, *SETTINGS)}
    try:
        for name, value in {NAME: None, **dict.fromkeys(SETTINGS, 7)}.items():
            jax.config.update(name, value)
        with compiled_once(tmp_path):
            assert getattr(jax.config, NAME) == str(tmp_path)
            assert {name: getattr(jax.config, name) for name in SETTINGS} == SETTINGS
        assert [getattr(jax.config, name) for name in (NAME, *SETTINGS)] == [None, 7, 7]
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)


def test_the_callers_own_folder_is_used(tmp_path: Path) -> None:
    kept = getattr(jax.config, NAME)
    try:
        jax.config.update(NAME, str(tmp_path / "callers"))
        with compiled_once(tmp_path / "ours"):
            assert getattr(jax.config, NAME) == str(tmp_path / "callers")
    finally:
        jax.config.update(NAME, kept)


@pytest.mark.slow
def test_what_is_compiled_lies_in_the_folder(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, jax\n"
        "from distillcache.tools.bench.compiled import compiled_once\n"
        "with compiled_once(pathlib.Path(sys.argv[1])):\n"
        "    jax.jit(lambda x: x * 2 + 1)(3.0)\n"
    )
    environment = {name: value for name, value in python_environment().items() if not name.startswith("JAX_")}
    command = python_words("-c", script, str(tmp_path))
    subprocess.run(command, check=True, env=environment | {"JAX_PLATFORMS": "cpu"}, cwd=os.sep)
    assert list(tmp_path.iterdir())
