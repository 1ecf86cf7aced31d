"""Reading a text while something else computes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def run_ahead(items: Iterator[Item], depth: int = 8) -> Iterator[Item]:
    """The same items, made in a thread up to ``depth`` of them before they are asked for.

    What the thread raises is raised here, in its place; when the consumer stops, so does the thread. A thread and not a
    process: the tokenizer computes without holding the GIL, and must not be forked once it has run.
    """
    made: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="run_ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, content = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise content
            yield content
    finally:
        stopped.set()
        thread.join(timeout=5.0)  # it may hang in a connection; a daemon does not keep the process alive
