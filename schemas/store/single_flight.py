"""A bounded memory cache of objects that will soon be read again; concurrent requests for one object read it once.

A store far away answers in tens of milliseconds, so the threads of a feed often want one thing at one time: the first
that asks reads it, the others wait for what it gets.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Remembered(Generic[Key, Value]):
    """The values of the keys that were used last. Safe to use from several threads."""

    def __init__(self, most: int) -> None:
        """`most`: how many values are held."""
        self._most, self._lock = most, threading.Lock()
        self._found: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, read: Callable[[], Value]) -> Value:
        """The value of `key`, read with `read` if it is not held. What it raises reaches all who wait for it."""
        with self._lock:
            future = self._found.get(key)
            if future is not None:
                self._found.move_to_end(key)
        return future.result() if future is not None else self._read(key, read)

    def forget(self, key: Key) -> None:
        """Read the key again when it is wanted next."""
        with self._lock:
            self._found.pop(key, None)

    def _read(self, key: Key, read: Callable[[], Value]) -> Value:
        future: Future[Value] = Future()
        with self._lock:
            known = self._found.setdefault(key, future)  # another thread may have come first meanwhile
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        if known is not future:
            return known.result()
        try:
            future.set_result(read())
        except BaseException as error:
            with self._lock:
                if self._found.get(key) is future:
                    del self._found[key]
            future.set_exception(error)
        return future.result()
