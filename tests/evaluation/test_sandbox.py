"""The sandbox of HumanEval against code that misbehaves."""

from __future__ import annotations

import collections
import decimal
import fractions
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phf.core.config import ConfigError
from phf.evaluation.capabilities import _sandboxed, humaneval
from phf.evaluation.capabilities.humaneval import HumanEval, function_body
from phf.evaluation.capabilities.sandbox import is_isolated, run_sandboxed
from phf.generation.loaded import load_model


@pytest.mark.parametrize(
    "program, passes",
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),  # exiting early does not pass
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("x = 'a' * (3 * 2**30)", False),
        ("open('f', 'w').write('x' * 2**22)", False),
        ("def f(:", False),
        ("print('noise' * 10_000)", True),
        ("import sys\nwhile True: sys.stderr.write('x' * 2**16)", False),
        ("import os; assert 'HOME' not in os.environ and os.listdir('.') == []", True),
    ],
)
def test_the_sandbox_finds_what_passes(program, passes):
    assert run_sandboxed(program, 2) is passes


needs_namespaces = pytest.mark.skipif(not is_isolated(), reason="no user namespaces on this system")

ATTEMPTS = {
    "the environment of its parent": ("open(f'/proc/{os.getppid()}/environ').read()", "FileNotFoundError"),
    "the user's files": ("os.listdir(os.path.expanduser('~'))", "FileNotFoundError"),
    "a write outside its folder": ("open(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')", "OSError"),
    "a new process": ("os.fork()", "PermissionError"),
    "a program": ("__import__('subprocess').run(['true'])", "PermissionError"),
    "the network": ("__import__('socket').create_connection(('127.0.0.1', 9), 1)", "OSError"),
    "other processes": ("os.kill(os.getppid(), 9) if os.getppid() else 1 / 0", "ZeroDivisionError"),
    "the disk": ("[open(str(n), 'wb').write(b'x' * 900_000) for n in range(40)]", "OSError"),
    "memory": ("bytearray(2 * 2**30)", "MemoryError"),
}
"""What code tries, and the exception that it gets."""
BODY = """
    import os
    try:
        return repr(ATTEMPT)[:40]
    except Exception as error:
        return type(error).__name__
"""


@needs_namespaces
@pytest.mark.parametrize("name", ATTEMPTS)
def test_in_the_sandbox_there_is_nothing_to_read_or_write(name):
    code, answer = ATTEMPTS[name]
    test = f"def check(f):\n    assert f() == {answer!r}, f()\n"
    assert run_sandboxed("def f():" + BODY.replace("ATTEMPT", code), 5, test, "f")


@needs_namespaces
@pytest.mark.parametrize(
    "attempt", ["c.mount(b'none', b'/usr/lib', None, 4128, None)", "c.unshare(0x10000000)", "c.ptrace(0, 0, 0, 0)"]
)
def test_rights_cannot_be_won_back(attempt):
    body = f"    import ctypes\n    c = ctypes.CDLL(None, use_errno=True)\n    return [{attempt}, ctypes.get_errno()]\n"
    test = "def check(f):\n    assert f() == [-1, 1], f()\n"  # EPERM
    assert run_sandboxed("def f():\n" + body, 5, test, "f")


ALWAYS_EQUAL = """
    class Equal(int):
        def __eq__(self, other):
            return True
    return Equal(9)
"""
WRITES_THE_VERDICT = """
    import os
    for n in range(12):
        try:
            os.write(n, b'{"passed": true}\\n')
        except OSError:
            pass
    return 9
"""
CALLS_THE_SANDBOX = """
    import gc
    for found in gc.get_objects():
        if callable(found) and getattr(found, "__name__", "") == "answer":
            found({"passed": True})
    return 9
"""


@pytest.mark.parametrize(
    "body, passes",
    [
        ("    return a + b\n", True),
        (ALWAYS_EQUAL, False),
        (WRITES_THE_VERDICT, False),
        (CALLS_THE_SANDBOX, False),
        ("    raise SystemExit(0)\n", False),
        ("    print('x' * 100_000)\n    return a + b\n", True),
        ("    s = '\ud83d'\n    return a + b\n", True),
        ("    import threading\n    t = threading.Thread(target=print)\n    t.start()\n    return a + b\n", True),
    ],
)
def test_what_the_model_wrote_cannot_decide_what_passes(body, passes):
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    assert run_sandboxed("def add(a, b):\n" + body, 4, test, "add") is passes


def test_tests_may_use_functions_of_the_prompt_and_changes_of_their_arguments():
    prompt = 'def double(x):\n    return 2 * x\n\n\ndef f(xs):\n    """Empty the list."""\n'
    test = """
def check(candidate):
    values = [1, (2.5, {'a': {3}}), None, b'z', float('inf'), 1j]
    xs = list(values)
    assert candidate(xs) == values
    assert xs == [] and double(2) == 4
    try:
        candidate(5)
    except AttributeError:
        return
    assert False
"""
    assert run_sandboxed(prompt + "    old = xs.copy()\n    xs.clear()\n    return old\n", 4, test, "f", helpers=prompt)


def test_nothing_that_a_program_starts_outlives_it(tmp_path):
    file = tmp_path / "alive"
    child = f"import os, time\nif os.fork() == 0:\n    time.sleep(2)\n    open({str(file)!r}, 'w')\n    os._exit(0)\n"
    run_sandboxed(child, 5)  # refused to fork, or stopped with it
    time.sleep(3)
    assert not file.exists()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    )
)
def test_plain_values_cross_between_the_processes_unchanged(value):
    back = _sandboxed.unpack(json.loads(json.dumps(_sandboxed.pack(value))))
    assert (back, type(back)) == (value, type(value))


@pytest.mark.parametrize(
    "value",
    [
        collections.deque([1, (2,)]),
        range(2, 9, 3),
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
        collections.Counter("aab"),
    ],
)
def test_other_values_of_the_standard_library_cross_too(value):
    assert _sandboxed.unpack(json.loads(json.dumps(_sandboxed.pack(value)))) == value


def test_iterators_cross_with_their_items():
    assert list(_sandboxed.unpack(_sandboxed.pack(n * n for n in range(4)))) == [0, 1, 4, 9]
    body = "def f(n):\n    for i in range(n):\n        yield i\n"
    assert run_sandboxed(body, 4, "def check(c):\n    assert list(c(3)) == [0, 1, 2]\n", "f")
    large = "def f(n):\n    return [2 ** 20_000] + list(range(300_000))\n"
    assert run_sandboxed(large, 9, "def check(c):\n    assert len(c(3)) == 300_001\n", "f")


def test_numbers_of_numpy_cross_as_numbers():
    assert [_sandboxed.unpack(_sandboxed.pack(v)) for v in (np.int64(3), np.float64(0.5))] == [3, 0.5]


def test_a_function_may_return_its_own_argument():
    test = "def check(candidate):\n    xs = [3, 1]\n    assert candidate(xs) is xs\n    assert xs == [1, 3]\n"
    assert run_sandboxed("def f(xs):\n    xs.sort()\n    return xs\n", 4, test, "f")
    assert not run_sandboxed("def f(xs):\n    return sorted(xs)\n", 4, test, "f")


def test_without_namespaces_nothing_runs_unless_it_is_insisted(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval, "is_isolated", lambda: False)
    row = {"prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(row) + "\n")
    model = load_model(runs / "a")
    with pytest.raises(ConfigError, match="without_sandbox=true"):
        HumanEval(str(path), run_untrusted_code=True).measure(model)
    insisted = HumanEval(str(path), max_tokens=4, run_untrusted_code=True, without_sandbox=True)
    assert insisted.measure(model).details["sandbox"] == "none"


def test_function_bodies_end_where_the_original_harness_ends_them():
    assert function_body("    return 1\n\ndef g():\n    pass\n") == "    return 1\n"
    assert function_body("    return 1") == "    return 1"
    text = '    s = """\nxyz\n"""\n    return s\n'
    assert function_body(text) == text
    for stop in ("class A: pass", "# note", "if True: pass", "print(1)"):
        assert function_body(f"    return 1\n{stop}\n") == "    return 1"
