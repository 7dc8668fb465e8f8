"""The program inside the sandbox of phf.evaluation.capabilities.sandbox. It imports only the standard library.

Run as `python -I _sandboxed.py ROLE SETTINGS`. First it gives up everything that a function does not need: the file
system but for an empty folder in memory and read-only libraries, the network, new processes, memory. Then it plays its
role. As "candidate" it runs what the model wrote, and answers calls of the function with plain values. As "judge" it
runs the tests, which call the function in the other process. The two know each other only by lines of JSON, so nothing
that the model wrote can decide what passes.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import ctypes
import decimal
import fractions
import itertools
import json
import operator
import os
import platform
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

MEGABYTE = 2**20
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
Plain = dict[str, Any]
KEPT_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
"""Flags of a mount as statvfs and as mount(2) number them: nosuid, nodev, noexec, noatime, nodiratime, relatime."""
MAX_LINE = 64 * MEGABYTE
MAX_ITEMS = 100_000
MAX_DEPTH = 60
SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset, collections.deque)


# Giving up


def confine(settings: Plain) -> None:
    """Give up what a function does not need. Raises OSError where the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if settings["root"]:
        _own_root(libc, settings["root"], settings["readable"])
    for name, limit in (
        ("RLIMIT_AS", 1024 * MEGABYTE),
        ("RLIMIT_CPU", settings["seconds"]),
        ("RLIMIT_FSIZE", MEGABYTE),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if settings["root"]:
        _drop_rights(libc)
    else:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _own_root(libc: ctypes.CDLL, root: str, readable: list[str]) -> None:
    """Make `root`, a file system in memory of 16 MB, the only one that can be seen, with `readable` below it."""

    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        _check(
            libc.mount(
                os.fsencode(source),
                os.fsencode(target),
                None if kind is None else kind.encode(),
                ctypes.c_ulong(flags),
                None if data is None else data.encode(),
            )
        )

    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=4096,mode=0755")
    for path in readable:
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, None, MS_BIND | MS_REC)
        kept = os.statvfs(target).f_flag  # flags that may not be taken away
        flags = sum(flag for bit, flag in KEPT_FLAGS if kept & bit)
        if path != "/dev/null":
            mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | flags)
    os.makedirs(root + "/tmp/work")
    os.chmod(root + "/tmp", 0o777)
    os.chroot(root)
    os.chdir("/tmp/work")


CALLS: Plain = {  # numbers of system calls
    "x86_64": {
        "arch": 0xC000003E,
        "clone": 56,
        "deny": (57, 58, 101, 165, 166, 155, 161, 272, 308, 321, 250, 425, 426, 298, 310, 311, 428, 429, 430, 442),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "clone": 220,
        "deny": (117, 40, 39, 41, 51, 97, 268, 280, 219, 425, 426, 241, 270, 271, 428, 429, 430, 442),
    },
}
CLONE3 = 435
CLONE_THREAD = 0x10000


def _drop_rights(libc: ctypes.CDLL) -> None:
    """Give up all rights of this process's user namespace, and the system calls that start processes or mount."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    _check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()))
    _check(libc.prctl(4, 0, 0, 0, 0))  # PR_SET_DUMPABLE
    calls = CALLS.get(platform.machine())
    if calls is None:
        raise OSError(f"no list of system calls for {platform.machine()}")
    load = 0x20  # operations of a filter
    equal = 0x15
    at_least = 0x35
    any_bit = 0x45
    give = 0x06
    allow = 0x7FFF0000  # its answers
    eperm = 0x00050001
    enosys = 0x00050026
    kill = 0x80000000
    deny = sorted(calls["deny"])
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, calls["arch"]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the numbers of x32
        (give, 0, 0, eperm),
        (equal, 0, 1, CLONE3),
        (give, 0, 0, enosys),  # the C library then uses clone
        (equal, 0, 4, calls["clone"]),
        (load, 0, 0, 16),
        (any_bit, 1, 0, CLONE_THREAD),
        (give, 0, 0, eperm),
        (give, 0, 0, allow),
    ]
    for number in deny:
        program += [(equal, 0, 1, number), (give, 0, 0, eperm)]
    program.append((give, 0, 0, allow))

    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter))]

    filters = (Filter * len(program))(*(Filter(*line) for line in program))
    _check(libc.prctl(22, 2, ctypes.byref(Program(len(program), filters)), 0, 0))  # PR_SET_SECCOMP, mode filter


# Plain values as JSON


def pack(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON data. Subclasses of plain types become the plain types, so that no method of theirs decides
    a comparison. Raises TypeError for any other value."""
    if depth > MAX_DEPTH:
        raise TypeError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return "".join(str.__iter__(value))
    if isinstance(value, int):
        return ["int", int.__repr__(value)]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, complex):
        return ["complex", complex.__repr__(value)]
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__, bytes(value).hex()]
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, [pack(v, depth + 1) for v in kind.__iter__(value)]]
    if isinstance(value, (type({}.keys()), type({}.items()))):
        return pack(set(value), depth)
    if isinstance(value, collections.Counter):
        return ["Counter", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    if isinstance(value, (types.GeneratorType, map, filter, zip, enumerate)):
        return ["iterator", pack(list(itertools.islice(value, MAX_ITEMS)), depth + 1)]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, (decimal.Decimal, fractions.Fraction)):
        return [type(value).__name__, str(value)]
    return ["int", int.__repr__(operator.index(value))]  # numpy's; TypeError for any other value


def unpack(value: Any) -> Any:
    """The value that `pack` packed. Raises ValueError or TypeError for anything else."""
    if not isinstance(value, list):
        return value
    kind, inner = value
    if kind in ("int", "float", "complex"):
        return {"int": int, "float": float, "complex": complex}[kind](inner)
    if kind in ("bytes", "bytearray"):
        return bytes.fromhex(inner) if kind == "bytes" else bytearray.fromhex(inner)
    if kind == "range":
        return range(*inner)
    if kind in ("Decimal", "Fraction"):
        return (decimal.Decimal if kind == "Decimal" else fractions.Fraction)(inner)
    if kind == "Counter":
        return collections.Counter({unpack(k): unpack(v) for k, v in inner})
    if kind == "iterator":
        return iter(unpack(inner))
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in inner}
    return {known.__name__: known for known in SEQUENCES}[kind](map(unpack, inner))


# The roles

Ask = Callable[[], Any]
Answer = Callable[[Plain], None]


def candidate(task: Plain, ask: Ask, answer: Answer) -> None:
    """Run what the model wrote, then call its function as asked."""
    namespace: Plain = {"__name__": "__main__"}
    exec(compile(task["program"], "sample", "exec"), namespace)
    answer({"ready": True})
    if task["entry_point"] is None:
        return
    while (call := ask()) is not None:
        arguments = unpack(call["arguments"])
        try:
            result = namespace[task["entry_point"]](*arguments, **unpack(call["named"]))
            same = next((n for n, argument in enumerate(arguments) if argument is result), None)
            answer({"result": pack(result), "same": same, "arguments": pack(arguments)})
        except BaseException as error:
            answer({"error": type(error).__name__, "message": str(error)[:500]})


def judge(task: Plain, ask: Ask, answer: Answer) -> None:
    """Run the tests. Their function is the one in the other process."""

    def function(*arguments: Any, **named: Any) -> Any:
        answer({"arguments": pack(list(arguments)), "named": pack(named)})
        found = ask()
        if found is None:
            raise RuntimeError("the function's process has ended")
        if "error" in found:
            known = getattr(builtins, str(found["error"]), None)
            known = known if isinstance(known, type) and issubclass(known, Exception) else RuntimeError
            raise known(str(found.get("message", "")))
        for mine, theirs in zip(arguments, unpack(found["arguments"]), strict=True):
            if isinstance(mine, list):
                mine[:] = theirs
            elif isinstance(mine, (dict, set)):
                mine.clear()
                mine.update(theirs)
        same = found["same"]
        return unpack(found["result"]) if same is None else arguments[same]

    namespace: Plain = {"__name__": "__main__"}
    for helpers in (task["helpers"], task["helpers"] + "\n    pass\n"):
        try:
            exec(compile(helpers, "helpers", "exec"), namespace)
            break
        except SyntaxError:
            continue
    namespace[task["entry_point"]] = function
    exec(compile(task["test"], "test", "exec"), namespace)
    namespace["check"](function)
    answer({"passed": True})


def main() -> None:
    settings = json.loads(sys.argv[2])
    sys.set_int_max_str_digits(0)  # the time limit bounds large numbers too
    reading = os.fdopen(os.dup(0), "r")
    writing = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what is printed goes nowhere
        os.dup2(nowhere, standard)

    def ask() -> Any:
        line = reading.readline(MAX_LINE)
        return json.loads(line) if line.endswith("\n") else None

    def answer(value: Plain) -> None:
        writing.write(json.dumps(value) + "\n")
        writing.flush()

    task = ask()
    try:
        confine(settings)
    except OSError as error:
        answer({"no_sandbox": str(error)})
        return
    answer({"confined": True})
    sys.stdin = None
    {"candidate": candidate, "judge": judge}[sys.argv[1]](task, ask, answer)


if __name__ == "__main__":
    main()
