"""Requests to servers: one client for all, with an end to every wait, from several threads."""

from __future__ import annotations

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx

from phf.core.config import Plain

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """`work` of each item, in order. The threads end with the process, so an interruption does not wait for requests in
    flight; and no item is started after the first error, or once the caller stops reading. An error waits for them."""
    found: list[queue.Queue[tuple[bool, Any]]] = [queue.Queue(1) for _ in items]
    places = iter(range(len(items)))
    lock = threading.Lock()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                found[place].put((True, work(items[place])))
            except BaseException as error:
                found[place].put((False, error))

    running = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in running:
        thread.start()
    try:
        for result in found:
            good, value = result.get()
            if not good:
                stop.set()
                for thread in running:  # their answers may be paid for
                    thread.join()
                raise value
            yield value
    finally:
        stop.set()


@functools.lru_cache(maxsize=1)
def _client() -> httpx.Client:
    """One client for all requests and threads: creating one takes longer than a request to a local server."""
    return httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))


MAX_ANSWER_BYTES = 64 << 20


def post_json(url: str, body: Plain, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
    """`_post_now` with an end after `timeout_s` seconds, whatever the server sends and however slowly."""
    found: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        try:
            found.put(_post_now(url, body, headers, timeout_s))
        except Exception as error:
            found.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=timeout_s + 1)
    except queue.Empty:
        raise httpx.ReadTimeout(f"no answer after {timeout_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    status, data = answer
    return int(status), bytes(data)


def _post_now(url: str, body: Plain, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
    """(status, body) of the answer to a POST. Raises httpx.HTTPError, also for an answer that is not whole after
    `timeout_s` seconds or is larger than `MAX_ANSWER_BYTES`."""
    deadline = time.monotonic() + timeout_s
    data = json.dumps(body).encode()  # ASCII: a lone surrogate in a prompt has no UTF-8 form
    headers = {"Content-Type": "application/json", **headers}
    with _client().stream("POST", url, content=data, headers=headers, timeout=timeout_s) as answer:
        parts = []
        size = 0
        for part in answer.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise httpx.ReadError(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"the answer was not whole after {timeout_s:g} s")
        return answer.status_code, b"".join(parts)
