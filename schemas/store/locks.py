"""The lock of a file against other processes, which the system gives back when its holder ends, however it ends."""

import fcntl

from distillcache.schemas.errors import StorageError


def try_lock(descriptor: int, path: object) -> bool:
    """Take the file's lock; False where another descriptor holds it.

    Raises:
        StorageError: the file system cannot say: it has no locks, or their server does not answer.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            "the file system cannot lock a file",
            {"file": path, "cause": error.strerror or error},
            "mount it with locks (NFS: lockd running, no `nolock`), or name a path on another disk or in a bucket",
        ) from error
    return True
