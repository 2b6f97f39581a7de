"""What generated code may do, and what it may not."""

import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtp_lightning.errors import SandboxError
from mtp_lightning.evaluation.code.sandbox import Calls, Limits, Programs, Sandbox
from tests.evaluation.code import escapes

LIMITS = Limits(seconds=0.6, memory_mib=256, file_mib=4)
TESTS = Calls(
    "import math\ndef check(g):\n    assert g(1) == 2\n    assert abs(g(40) - 41) < 1e-6 and math.isclose(g(7), 8)\n"
    "    assert all([g(3) == 4])\ncheck(f)",
    ["f"],
)
CASES = Programs([("1\n", "2\n"), ("41\n", "42\n")])


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(LIMITS)
    except SandboxError as refused:
        pytest.skip(f"this kernel permits no sandbox: {refused.found}")


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
    deadline = time.monotonic() + 5
    while sandboxes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandboxes() == []


def sandboxes() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"inside.referee" in command or command == b"sleep\x001000\x00":
            found.append(folder.name)
    return found


def passed(sandbox, codes, tests):
    with ThreadPoolExecutor(4) as threads:
        verdicts = dict(zip(codes, threads.map(lambda code: sandbox.run(code, tests), codes.values()), strict=True))
    return {name: verdict for name, verdict in verdicts.items() if verdict.outcome == "passed"}


@pytest.mark.parametrize("kind", ["ENDS", "LIES", "FORGERIES", "PROCESSES", "WAYS_OUT"])
def test_code_that_cheats_or_breaks_out_fails(sandbox, around, kind):
    codes = getattr(escapes, kind)
    if kind == "WAYS_OUT":
        for key, value in around.items():
            codes = {name: code.replace(f"{{{key}}}", str(value)) for name, code in codes.items()}
    assert passed(sandbox, codes, TESTS) == {}


def test_programs_that_cheat_fail(sandbox, around):
    assert passed(sandbox, escapes.PROGRAMS, CASES) == {}
