"""`import distillcache` beside files of a user's own that are called as our folders are."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import distillcache

ROOT = Path(__file__).parent.parent
PROGRAM = """
import models, schemas, tools, trainer
assert {m.mine for m in (models, schemas, tools, trainer)} == {1}
import distillcache
from distillcache.schemas.config import BuildConfig
from distillcache.models.decoder import Decoder
assert distillcache.BuildConfig is BuildConfig
for name in distillcache.__all__:
    getattr(distillcache, name)
print(distillcache.__file__)
print(sys.modules["distillcache.schemas.errors"].__file__)
"""


def run_beside_namesakes(folder: Path, **environment: str) -> list[str]:
    """The lines that a user's script prints in a folder with modules of our folders' names."""
    (folder / "models").mkdir(parents=True)
    for name in ("models/__init__.py", "tools.py", "schemas.py", "trainer.py"):
        (folder / name).write_text("mine = 1\n")
    (folder / "script.py").write_text("import sys\n" + PROGRAM)
    # As a user's shell would run it: whatever the tests themselves run under does not count.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_names_of_the_package() -> None:
    assert set(distillcache.__all__) <= set(dir(distillcache))
    with pytest.raises(AttributeError, match="nothing"):
        _ = distillcache.nothing


def test_an_installed_checkout(tmp_path: Path) -> None:
    package, errors = run_beside_namesakes(tmp_path / "user")
    assert package.endswith("distillcache/__init__.py")
    assert errors.endswith("schemas/errors.py")


@pytest.mark.slow
def test_a_wheel(tmp_path: Path) -> None:
    """One top-level package, complete without the checkout."""
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, *words, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert len([top for top in tops if not top.endswith(".dist-info")]) == 1
        archive.extractall(tmp_path / "site")
    package, errors = run_beside_namesakes(tmp_path / "user", PYTHONPATH=str(tmp_path / "site"))
    assert Path(package).is_relative_to(tmp_path / "site")
    assert Path(errors).is_relative_to(tmp_path / "site" / "distillcache")
    assert (tmp_path / "site" / "distillcache" / "py.typed").exists()
    assert (tmp_path / "site" / "distillcache" / "tools" / "pages" / "templates" / "style.css").exists()
