"""The threads that wait for buckets: one pool for all sources of a process."""

import functools
from concurrent.futures import ThreadPoolExecutor

THREADS = 32  # requests at a time: as many as TensorStore has under way by default


@functools.cache
def far_pool() -> ThreadPoolExecutor:
    """Starts no thread before it is used. A thread holds one answer at a time (`requests.REQUEST_BYTES`)."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="feed-far")
