"""Running functions that a model wrote, in namespaces of their own: without files, network and other processes.

Two processes run for each sample (`_sandboxed.py`). One runs what the model wrote; the other one runs the tests and
calls the function in the first. What passes is decided by the second, which never runs a line of the model's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from phf.core.config import Plain

SCRIPT = str(Path(__file__).with_name("_sandboxed.py"))
UNSHARE = (
    "unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"
)  # fmt: skip
"""The command that starts a process in namespaces of its own; nothing that it starts outlives it."""
MAX_BYTES = 1 << 26
"""Bytes of a message between the two processes."""


def run_sandboxed(
    program: str,
    timeout_s: float,
    test: str | None = None,
    entry_point: str | None = None,
    helpers: str = "",
) -> bool:
    """Whether the function `entry_point` in `program` passes `test`, which defines `check(candidate)`, within limits.

    `helpers`: code whose functions the test may use besides the candidate: the problem's prompt. Without `test`, the
    last `def check(...)` of `program` is the test, and a program without one passes if it runs to its end.
    """
    if test is None:
        program, test, entry_point = _split(program)
    return _Run(program, test, entry_point, helpers, timeout_s, isolated=bool(is_isolated())).passed()


def _split(program: str) -> tuple[str, str | None, str | None]:
    """(program, test, name of the tested function) of a program that ends in `def check(...)` and a call of it."""
    start = program.rfind("\ndef check(")
    called = re.search(r"^check\((\w+)\)\s*\Z", program, re.MULTILINE)
    if start < 0 or called is None:
        return program, None, None
    return program[: start + 1], program[start + 1 : called.start()], called.group(1)


class _Run:
    """The two processes of one sample, and what they say to each other."""

    def __init__(
        self, program: str, test: str | None, entry_point: str | None, helpers: str, timeout_s: float, isolated: bool
    ) -> None:
        self.test = test
        self.timeout_s = timeout_s
        self.isolated = isolated
        text = program.encode("utf-8", "replace").decode()  # without lone surrogates
        self.tasks = {
            "candidate": {
                "program": text,
                "entry_point": entry_point if test is not None else None,
            },
            "judge": {"helpers": helpers, "test": test, "entry_point": entry_point},
        }
        self.problem: str | None = None
        """Why there is no sandbox here."""

    def passed(self) -> bool:
        roles = ("candidate",) if self.test is None else ("candidate", "judge")
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self.processes = {role: stack.enter_context(self._started(role, folder)) for role in roles}
            self.rest = dict.fromkeys(roles, b"")
            return self._relay(time.monotonic() + self.timeout_s + 1)

    @contextlib.contextmanager
    def _started(self, role: str, folder: str) -> Any:
        work = os.path.join(folder, role)
        os.mkdir(work)
        settings = {
            "root": work if self.isolated else None,
            "readable": readable() if self.isolated else [],
            "seconds": math.ceil(self.timeout_s),
        }
        process = subprocess.Popen(
            [*(UNSHARE if self.isolated else ()), sys.executable, "-I", "-S", SCRIPT, role, json.dumps(settings)],
            cwd=work,
            env={"PATH": os.environ.get("PATH", "")},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._tell(process, json.dumps(self.tasks[role]).encode() + b"\n")
            yield process
        finally:  # with everything that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _tell(self, process: subprocess.Popen[bytes], line: bytes) -> bool:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            return False
        return True

    def _relay(self, deadline: float) -> bool:
        """Carry calls and answers between the processes until one of them decides, or time is up."""
        others = {"candidate": "judge", "judge": "candidate"}
        with selectors.DefaultSelector() as selector:
            for role, process in self.processes.items():
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                selector.register(process.stdout, selectors.EVENT_READ, role)
            ready = False
            waiting: list[bytes] = []
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    role = key.data
                    lines = self._lines(role)
                    if lines is None:
                        return False
                    for line in lines:
                        said = _parsed(line)
                        if said is None:
                            return False
                        if "no_sandbox" in said:
                            self.problem = str(said["no_sandbox"])
                            return False
                        if role == "judge" and said.get("passed") is True:
                            return True
                        if "confined" in said:
                            continue
                        if role == "candidate" and not ready:
                            if said.get("ready") is not True:
                                return False
                            if self.test is None:
                                return True
                            ready = True
                            for call in waiting:
                                self._tell(self.processes["candidate"], call)
                        elif role == "judge" and not ready:
                            waiting.append(line + b"\n")
                        else:
                            self._tell(self.processes[others[role]], line + b"\n")
        return False

    def _lines(self, role: str) -> list[bytes] | None:
        """Whole lines that a process has written; None if it has ended or writes too much."""
        stdout = self.processes[role].stdout
        assert stdout is not None
        try:
            data = os.read(stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return []
        if not data or len(self.rest[role]) > MAX_BYTES:
            return None
        *lines, self.rest[role] = (self.rest[role] + data).split(b"\n")
        return lines


def _parsed(line: bytes) -> Plain | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@functools.cache
def readable() -> list[str]:
    """Files and folders that Python needs to run: they can be read in the sandbox."""
    paths = sysconfig.get_paths()
    wanted = {sys.base_prefix, paths["stdlib"], paths["platstdlib"], os.path.realpath(sys.executable), SCRIPT}
    wanted |= {
        p for p in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/dev/null") if Path(p).exists()
    }
    if sys.base_prefix == "/usr":  # the whole of /usr would show what is installed
        wanted.discard(sys.base_prefix)
    found = sorted(os.path.normpath(p) for p in wanted)
    return [p for p in found if not any(p != q and p.startswith(q + "/") for q in found)]


@functools.cache
def is_isolated() -> bool:
    """Whether this system starts processes in namespaces of their own, as the sandbox needs them."""
    run = _Run("x = 1\n", None, None, "", 20, isolated=True)
    try:
        return run.passed()
    except OSError:  # there is no `unshare`
        return False
