"""Preparing what comes next while the last one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar, cast

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """``items``, up to ``depth`` of which a thread has ready ahead of time; with 0 there is no thread.

    What ``items`` raises is raised where its item would have come. The thread ends with ``items``, or when the iterator
    is closed or collected, and is waited for.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[bool, object]] = queue.Queue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def prepare() -> None:
        try:
            # Room is waited for first, so that no more than ``depth`` items are in memory that nobody took.
            while room.acquire() and not stopped.is_set():
                try:
                    item = next(items)
                except StopIteration:
                    break
                ready.put((True, item))
        except BaseException as error:
            ready.put((False, error))
        else:
            ready.put((False, None))

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            is_item, content = ready.get()
            if not is_item:
                if content is not None:
                    raise cast(BaseException, content)
                return
            room.release()
            yield cast(Item, content)
    finally:
        stopped.set()
        room.release()
        thread.join()
