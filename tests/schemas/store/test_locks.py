"""The lock of a file: who holds it, and a file system that has none."""

import errno
import fcntl
from pathlib import Path

import pytest

from distillcache.schemas.errors import InputError, StorageError
from distillcache.schemas.store import stale_locks
from distillcache.schemas.store.locks import try_lock
from distillcache.schemas.store.store import Store
from distillcache.trainer.run.folder import only_one

REASONS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO]


def test_one_descriptor_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert try_lock(first.fileno(), "lock")
        assert not try_lock(second.fileno(), "lock")
        with pytest.raises(InputError, match="another process is training"), only_one(Store(str(tmp_path))):
            pass


@pytest.mark.parametrize("reason", REASONS)
def test_a_file_system_that_cannot_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StorageError, match="cannot lock") as caught, only_one(Store(str(tmp_path / "run"))):
        pass
    assert caught.value.facts["cause"] == "no locks here"


@pytest.mark.parametrize("reason", REASONS[:3])
def test_lock_files_are_left_where_nothing_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(reason, "no locks here")

    (tmp_path / "key.__lock").write_bytes(b"tail")
    monkeypatch.setattr(stale_locks, "lock_as_tensorstore", fail)
    Store(str(tmp_path)).clear_stale_locks()
    assert (tmp_path / "key.__lock").read_bytes() == b"tail"


def test_a_run_in_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    """A file stands where the run's folder would be made: root may write anywhere else."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    with pytest.raises(StorageError, match="run's folder cannot be written"), only_one(Store(str(place))):
        pass


def test_a_lock_that_cannot_be_opened_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match="run's folder cannot be written"), only_one(Store(str(tmp_path))):
        pass
