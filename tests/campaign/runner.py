"""A process that has imported phf and forks for every command: seconds less per command than a new interpreter.

Reads tasks as JSON lines from stdin and answers each with a JSON line. A task may disturb its command at one of the
changes of the disk that Python makes (rename, unlink, mkdir, rmdir, open for writing): `kill` it there, let the disk be
`full`, or `pause` until a file appears. Point 0 counts the changes.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")


def disturb(point: int, how: str, report: Path) -> None:
    """Disturb this process at its `point`-th change of the disk: odd ones before the change, even ones after it."""
    me = os.getpid()
    seen = 0
    plain_open = os.open

    def strike() -> None:
        if how == "kill":
            os.kill(me, signal.SIGKILL)
        elif how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            Path(f"{report}.paused").touch()
            while not Path(f"{report}.go").exists():
                time.sleep(0.01)

    def wrapped(call, changes=lambda *args, **named: True):
        def inner(*args, **named):
            nonlocal seen
            if os.getpid() != me or not changes(*args, **named):
                return call(*args, **named)
            seen += 1
            here = seen
            if here == point and (point % 2 or how == "full"):
                strike()
            try:
                result = call(*args, **named)
            finally:  # also where there was nothing to change
                if here == point and point % 2 == 0 and how != "full":
                    strike()
            if point == 0:
                handle = plain_open(str(report), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.write(handle, str(seen).encode())
                os.close(handle)
            return result

        return inner

    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))
    writes = lambda file, mode="r", *a, **k: any(c in mode for c in "wax+") and not str(file).startswith("/dev")  # noqa: E731
    builtins.open = io.open = wrapped(builtins.open, writes)


def run(task: dict) -> None:
    """The command of a task, in a process of its own."""
    os.setsid()
    os.chdir(task["cwd"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["phf", *task["argv"]]
    if task.get("point") is not None:
        disturb(task["point"], task.get("how", "kill"), Path(task["report"]))
    code = 0
    try:
        from phf.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import phf.evaluation.evaluate
    import phf.labelling.label
    import phf.redteaming.attack
    import phf.release
    import phf.scorers.fitting
    import phf.scoring.score
    import phf.tokens.store
    import phf.training.train  # noqa: F401

    torch.set_num_threads(1)
    running: dict[int, int] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            _, status = os.waitpid(task["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run(task)
        if task.get("background"):
            running[pid] = pid
            print(json.dumps({"pid": pid}), flush=True)
            continue
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
