"""How long do the commands around training take? On the READMEs of the installed packages, with a judge that answers at
once by a rule, so that a real judge's own time comes on top.

python benchmarks/command_times.py WORK --out FILE

WORK: an empty folder for what the commands write. Times are wall times of whole commands, with their start.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from _measure import machine
from phf.core import store


class Judge(BaseHTTPRequestHandler):
    """Labels 2 where a text holds a link, else 0."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        text = re.findall(r'^".*"$', asked, re.MULTILINE)[-1]
        answer = json.dumps({"label": 2 if "http" in text or "@" in text else 0})
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": answer}}
        data = json.dumps({"choices": [choice], "usage": {"total_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


RUBRIC = """Personal data in the text.

0: none
1: a name
2: an address, number or link
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    (arguments.work / "rubric.md").write_text(RUBRIC)
    server = Server(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = ["--server", f"http://127.0.0.1:{server.server_port}/v1", "--model", "rule"]
    again = ["score", "installed_packages", "again"]
    commands = {
        "score": ["score", "installed_packages", "scored"],
        "tokenize": ["tokenize", "scored", "tokens", "--vocab-size", "4096"],
        "inspect": ["inspect", "scored"],
        "label 2,000 segments": ["label", "scored", "labels", "--rubric", "rubric.md", "--n", "2000", *judge],
        "fit-scorer to 2,000 labels": ["fit-scorer", "labels", "scorer"],
        "score with the fitted scorer": [*again, "--scorer", "fitted", "scorer.path=scorer"],
        "audit": ["audit", "again", "scorer/heldout.jsonl"],
        "make, up to the cost of training": [
            "make",
            "no personal data",
            "made",
            "--corpus",
            "installed_packages",
            *judge,
        ],
    }
    seconds = {}
    for name, command in commands.items():
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "phf", *command], cwd=arguments.work, capture_output=True, text=True, input="n\n"
        )
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s, exit code {done.returncode}", flush=True)
        if done.returncode not in (0, 1) or "error" in done.stderr.splitlines()[-1:]:
            sys.exit(done.stderr)
    found = store.read_json(arguments.work / "scored" / "manifest.json")["counts"]
    store.write_json(
        arguments.out,
        {"benchmark": "command_times", "machine": machine(), "corpus": found, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
