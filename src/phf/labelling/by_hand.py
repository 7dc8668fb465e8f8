"""A person labels texts on a page of their own machine: `phf label scored/ labels/ --rubric rubric.md --by-hand`.

The page shows one text at a time, without its score, and takes labels by keyboard. Each label is on disk before the
next text appears. The server answers on 127.0.0.1 only, to addresses that hold its secret.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import ConfigError, Plain
from phf.core.text import one_line, visible
from phf.generation.server import Answers
from phf.labelling.judges import Cost, Given, Judge
from phf.labelling.rubric import Rubric

PAGE = Path(__file__).with_name("by_hand.html")
SKIPPED = "skipped"
"""Kept instead of a label for a text that the person did not want to label."""
NOT_YET = "not labelled yet"
MAX_BODY = 10_000


@dataclass(frozen=True)
class ByHand(Judge):
    """A person. `who`: their name in the file of labels. `port`: of the page; 0: any free one."""

    who: str = "by hand"
    port: int = 0
    finished: bool = False
    """Take what the person labelled before, and show no page."""

    def identity(self) -> Any:
        return ["by hand", self.who]

    @property
    def title(self) -> str:
        return self.who

    def cost(self, texts: Sequence[str], rubric: Rubric, repeats: int, answers: Answers) -> Cost:
        if repeats > 1:
            raise ConfigError("a person labels each text once; a second person has another name (--who)")
        known = sum(self._key(rubric, text) in answers.known for text in texts)
        return Cost(len(texts) - known, known, 0, 0)

    def _key(self, rubric: Rubric, text: str) -> str:
        return store.fingerprint([self.identity(), rubric.text, text])

    def labels(self, texts: Sequence[str], rubric: Rubric, repeat: int, answers: Answers) -> Iterator[Given]:
        keys = [self._key(rubric, text) for text in texts]
        if not self.finished and any(key not in answers.known for key in keys):
            serve(_Session(texts, keys, rubric, answers), self.port)
        for key in keys:
            label = answers.known.get(key)
            if label == SKIPPED:
                yield Given(None, SKIPPED)
            elif isinstance(label, int) and 0 <= label <= rubric.top:
                yield Given(label)
            else:
                yield Given(None, NOT_YET)


class _Session:
    """What the page shows and what it may change."""

    def __init__(self, texts: Sequence[str], keys: Sequence[str], rubric: Rubric, answers: Answers) -> None:
        self.texts = texts
        self.keys = keys
        self.rubric = rubric
        self.answers = answers
        self.ended = threading.Event()

    def about(self) -> Plain:
        """What the page shows once."""
        return {"rubric": visible(self.rubric.text), "meanings": [visible(m) for m in self.rubric.meanings]}

    def item(self, number: int | None = None) -> Plain:
        """A text; without `number` the first one without a label. `number` is then the count of texts if all have
        one."""
        open_ = (n for n, key in enumerate(self.keys) if key not in self.answers.known)
        number = next(open_, len(self.keys)) if number is None else min(max(number, 0), len(self.keys))
        inside = number < len(self.keys)
        return {
            "number": number,
            "total": len(self.keys),
            "done": sum(key in self.answers.known for key in self.keys),
            "text": visible(self.texts[number]) if inside else "",
            "label": self.answers.known.get(self.keys[number]) if inside else None,
        }

    def label(self, number: Any, label: Any) -> None:
        """Keep a label. Raises ValueError for one that the rubric does not have."""
        good = isinstance(label, int) and not isinstance(label, bool) and 0 <= label <= self.rubric.top
        whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.keys)
        if not whole or not (good or label == SKIPPED):
            raise ValueError(f"no label {label!r} for text {number!r}")
        self.answers.keep(self.keys[number], label)


class _Quiet(ThreadingHTTPServer):
    """A browser that closes its connection is no error."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def serve(session: _Session, port: int) -> None:
    """Serve the page until the person ends it. Raises ConfigError for a port that is not free."""
    secret = secrets.token_urlsafe(16)
    handler = _handler(session, secret)
    try:
        server = _Quiet(("127.0.0.1", port), handler)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be used: {error.strerror}; give another --port, or none") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    print(f"label on http://127.0.0.1:{server.server_port}/{secret}/", file=sys.stderr, flush=True)
    try:
        while not session.ended.wait(0.5):
            pass
    finally:
        server.shutdown()
        server.server_close()


def _handler(session: _Session, secret: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _name(self) -> str | None:
            """The part of the address after the secret; None for a request that is not the page's own."""
            hosts = (f"127.0.0.1:{self.server.server_port}", f"localhost:{self.server.server_port}")  # type: ignore[attr-defined]
            first, _, rest = self.path.lstrip("/").partition("/")
            known = hmac.compare_digest(first.encode(), secret.encode())
            return rest if known and self.headers.get("Host") in hosts else None

        def _send(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header(
                "Content-Security-Policy",
                "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
            )
            self.end_headers()
            self.wfile.write(data)

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(status, "application/json", json.dumps(value).encode())

        def do_GET(self) -> None:
            name = self._name()
            what, _, number = (name or "").partition("/")
            if name == "":
                self._send(200, "text/html", PAGE.read_bytes())
            elif name == "about":
                self._json(session.about())
            elif what == "item" and (not number or (number.isdecimal() and len(number) < 10)):
                self._json(session.item(int(number) if number else None))
            else:
                self._json({"error": "no such page"}, 404)

        def do_POST(self) -> None:
            name = self._name()
            size = self.headers.get("Content-Length", "")
            if name not in ("label", "end") or not size.isdecimal() or int(size) > MAX_BODY:
                self._json({"error": "no such page"}, 404)
                return
            body = self.rfile.read(int(size))
            if name == "end":
                self._json({})
                session.ended.set()
                return
            try:
                given = store.parse_json(body)
                session.label(given.get("number"), given.get("label"))
            except (ValueError, AttributeError) as error:
                self._json({"error": str(error)}, 400)
                return
            except OSError as error:  # a full disk
                self._json({"error": one_line(error)}, 500)
                return
            self._json(session.item(given["number"] + 1))

    return Handler
