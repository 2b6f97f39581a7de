# ruff: noqa: E501 - programs, of which each line is one
"""What generated code may do, and what it may not."""

import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtp_lightning.errors import SandboxError
from mtp_lightning.evaluation.code import sandbox as sandbox_of_code
from mtp_lightning.evaluation.code.problems import Problem
from mtp_lightning.evaluation.code.samples import VERDICT, Line, LineLog
from mtp_lightning.evaluation.code.sandbox import Calls, Limits, Programs, Sandbox
from mtp_lightning.evaluation.code.score import judge
from tests.evaluation.code import escapes
from tests.support.runs import ROOT

pytestmark = pytest.mark.xdist_group("sandbox")  # one process: it looks for what sandboxes leave behind
LIMITS = Limits(seconds=0.6, memory_mib=256, file_mib=4)
TESTS = Calls(
    "import math\ndef check(g):\n    assert g(1) == 2\n    assert abs(g(40) - 41) < 1e-6 and math.isclose(g(7), 8)\n"
    "    assert all([g(3) == 4])\ncheck(f)",
    ["f"],
)
LIBRARIES = sandbox_of_code._libraries
CASES = Programs([("1\n", "2\n"), ("41\n", "42\n")])


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(LIMITS)
    except SandboxError as refused:
        pytest.skip(f"this kernel permits no sandbox: {refused.found}")


@pytest.fixture
def under_tmp():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_packages_may_lie_in_the_folder_of_temporary_files(sandbox, under_tmp, monkeypatch):
    """As those of a virtual environment under /tmp do: they can be read, and nothing beside them, nor written to."""
    packages = under_tmp / "packages"
    packages.mkdir()
    (packages / "one.py").write_text("two = 2\n")
    (under_tmp / "secret").write_text("2")
    monkeypatch.setattr(sandbox_of_code, "_libraries", lambda: [*LIBRARIES(), str(packages)])
    asks = Calls("assert f() == 2", ["f"])
    reads = f"import sys\nsys.path.append({str(packages)!r})\ndef f():\n    import one\n    return one.two"
    assert sandbox.run(reads, asks, seconds=3.0).outcome == "passed"
    beside = f"def f(): return int(open({str(under_tmp / 'secret')!r}).read())"
    assert sandbox.run(beside, asks).outcome == "failed"
    writes = f"def f(): return open({str(packages / 'two.py')!r}, 'w') and 2"
    assert sandbox.run(writes, asks).outcome == "failed"


@pytest.fixture
def around(tmp_path):
    """Things outside that code may try to reach; sees to it that nothing of the code is left."""
    secret, door = tmp_path / "secret", tmp_path / "door"
    secret.write_text("2")
    tmp_path.chmod(0o777)
    before = set(Path("/tmp").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(door))
        local.listen()
        names = {"mark": f"mark{secrets.token_hex(4)}", "port": listener.getsockname()[1], "secret": secret}
        yield {**names, "folder": tmp_path, "socket": door}
        for one in (listener, local):
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.accept()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["door", "secret"]
    assert not [
        path for path in set(Path("/tmp").iterdir()) - before if "mtp" in path.name or names["mark"] in path.name
    ]
    assert not Path(f"/usr/lib/{names['mark']}").exists()
    assert socket.gethostname() != names["mark"]
    assert is_empty()


def is_empty() -> bool:
    """Wait until no process of a sandbox is left."""
    deadline = time.monotonic() + 5
    while sandboxes() and time.monotonic() < deadline:
        time.sleep(0.05)
    return sandboxes() == []


def sandboxes() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if (b"inside.referee" in command and os.fsencode(ROOT) in command) or command == b"sleep\x0098765\x00":
            found.append(folder.name)
    return found


def passed(sandbox, codes, tests, seconds=None):
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda code: sandbox.run(code, tests, seconds=seconds), codes.values())
        verdicts = dict(zip(codes, found, strict=True))
    return {name: verdict for name, verdict in verdicts.items() if verdict.outcome == "passed"}


one_in = pytest.mark.parametrize("one_in", [3, pytest.param(1, marks=pytest.mark.slow)])


def some_of(codes, one_in):
    return {name: codes[name] for name in [*codes][::one_in]}


@one_in
@pytest.mark.parametrize("kind", ["ENDS", "LIES", "FORGERIES", "PROCESSES", "WAYS_OUT"])
def test_code_that_cheats_or_breaks_out_fails(sandbox, around, kind, one_in):
    codes = some_of(getattr(escapes, kind), one_in)
    if kind == "WAYS_OUT":
        for key, value in around.items():
            codes = {name: code.replace(f"{{{key}}}", str(value)) for name, code in codes.items()}
    assert passed(sandbox, codes, TESTS) == {}


@one_in
def test_programs_that_cheat_fail(sandbox, around, one_in):
    assert passed(sandbox, some_of(escapes.PROGRAMS, one_in), CASES) == {}


FILES_AND_PROCESSES = (
    "writes outside",
    "looks at other processes",
    "reads a file of the user",
    "reads the home of root",
)
"""What the weak sandbox does not keep code from, and nobody is asked to believe that it does."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ENDS", "LIES", "FORGERIES", "PROCESSES", "WAYS_OUT"])
def test_the_weak_sandbox_keeps_the_rest(kind):
    try:
        sandbox = Sandbox(LIMITS, weak=True)
    except SandboxError as refused:
        pytest.skip(f"not on this machine: {refused.found}")
    known = {name: code for name, code in getattr(escapes, kind).items() if name not in FILES_AND_PROCESSES}
    codes = {name: code for name, code in known.items() if name not in ("kills everything", "stops everything")}
    before = {path.name for path in Path("/tmp").iterdir()}
    assert passed(sandbox, codes, TESTS) == {}
    assert is_empty()
    assert not [path for path in Path("/tmp").iterdir() if path.name not in before and path.owner() == "nobody"]


HEALTHY = {
    "a class": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x + 1",
    "a file of its own": "def f(x):\n    open('n', 'w').write(str(x + 1))\n    return int(open('n').read())",
    "threads that end": "import threading\ndef f(x):\n    found = []\n    t = threading.Thread(target=found.append, args=(x + 1,))\n"
    "    t.start(); t.join()\n    return found[0]",
    "a program": "import subprocess\ndef f(x): return int(subprocess.run(['expr', str(x), '+', '1'], capture_output=True).stdout)",
    "prints much": "def f(x):\n    print('x' * 10**6)\n    return x + 1",
    "numpy": "import numpy as np\ndef f(x): return np.int64(x) + np.int64(1)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**5)\ndef g(n): return 1 if n == 0 else g(n - 1)\ndef f(x): return x + g(5000)",
    "random numbers": "import random, secrets, uuid\nuuid.uuid4(), secrets.token_hex()\ndef f(x): return x + random.randint(1, 1)",
    "an event loop": "import asyncio\nasync def g(x): return x + 1\ndef f(x): return asyncio.run(g(x))",
    "a closure": "f = (lambda one: lambda x: x + one)(1)",
    "a temporary folder": "import os, tempfile\ndef f(x):\n    with tempfile.TemporaryDirectory() as d: os.mkdir(d + '/e')\n    return x + 1",
    "a main block": "def f(x): return x + 1\nif __name__ == '__main__': raise SystemExit(1)",
    "exits with `exit` in a branch never taken": "def f(x):\n    if x == -1: exit()\n    return x + 1",
    "much memory": "x = bytearray(100 << 20)\ndef f(x): return x + 1",
}


def test_healthy_code_passes(sandbox, around):
    assert passed(sandbox, HEALTHY, TESTS, seconds=30).keys() == HEALTHY.keys()


VALUES = (
    "None, True, 1, 10**5000, -1.5, float('inf'), 'ä\\ud800', b'\\xff', bytearray(b'a'), 1 + 2j, range(3), [1, (2,)], {1: {2}}, "
    "{(1, 2): [3]}, frozenset({1}), Decimal('1.10'), Fraction(1, 3), datetime(2024, 1, 2), date(2024, 1, 2), deque([1]), "
    "timedelta(1), [], (), set(), {}, Counter('aab'), OrderedDict(a=1)"
)
IMPORTS = (
    "from collections import Counter, OrderedDict, deque\nfrom datetime import date, datetime, timedelta\n"
    "from decimal import Decimal\nfrom fractions import Fraction\n"
)


def test_values_cross_both_ways_as_they_are(sandbox):
    code = f"{IMPORTS}def given(): return [{VALUES}]\ndef same(x): return x"
    tests = f"{IMPORTS}own = [{VALUES}]\n" + (
        "assert given() == own == same(own)\n"
        "for a, b, c in zip(given(), own, same(own)):\n"
        "    kind = {Counter: dict, OrderedDict: dict}.get(type(b), type(b))\n"
        "    assert type(a) is type(c) is kind, (a, b, c)\n"
    )
    assert sandbox.run(code, Calls(tests, ["given", "same"]), seconds=30) == ("passed", "")


OBJECTS = {
    "objects, attributes and methods": (
        "class N:\n    def __init__(s, v): s.v, s.left = v, None\n    def up(s, by=1): return s.v + by\n"
        "def total(n): return n.v + (total(n.left) if n.left else 0)",
        "n = N(1)\nn.left = N(2)\nassert total(n) == 3 and n.left.v == 2 and n.up(by=4) == 5 and str(n.left.v) == '2'",
        ["N", "total"],
    ),
    "generators": (
        "def g(n):\n    yield from range(n)",
        "assert list(g(3)) == [0, 1, 2]\nassert next(g(1)) == 0",
        ["g"],
    ),
    "functions of the tests": (
        "def m(f, xs): return [f(x) for x in xs]",
        "assert m(lambda x: x * 2, [1, 2]) == [2, 4]\nassert m(str, [1]) == ['1']",
        ["m"],
    ),
    "errors": (
        "def e(x): raise ValueError('no')",
        "try:\n    e(1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'",
        ["e"],
    ),
    "sequences": (
        "class S:\n    def __len__(s): return 2\n    def __getitem__(s, i): return [5, 6][i]\ndef s(): return S()",
        "assert len(s()) == 2 and s()[1] == 6 and sorted(s()) == [5, 6]",
        ["s"],
    ),
}


def test_objects_are_used_where_they_are(sandbox):
    for name, (code, tests, names) in OBJECTS.items():
        assert sandbox.run(code, Calls(tests, names), seconds=30) == ("passed", ""), name


def test_an_interrupt_does_not_wait_for_programs_that_take_their_time(sandbox, tmp_path):
    """Two run, in threads of their own, and more are to come."""
    problem = Problem(name="p", prompt="", request="", stop_strings=(), before="", tests=Calls("pass", ["f"]))
    code = "import time\ntime.sleep({})\ndef f(): pass\n"
    lines: list[Line] = [
        {"task_id": "p", "temperature": 0.0, "sample": number, "completion": code.format(600 + number)}
        for number in range(6)
    ]
    waiting = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    patient = Sandbox(Limits(seconds=20))
    with LineLog(tmp_path / "verdicts.jsonl", VERDICT) as verdicts:
        waiting.start()
        began_at = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            judge({"p": problem}, lines, verdicts, patient, is_chat=False, workers=2, advance=lambda _: None)
        assert time.monotonic() - began_at < 10
        assert verdicts.lines == []
    assert is_empty()
