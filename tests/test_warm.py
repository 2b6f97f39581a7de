"""A Python that is forked behaves as one that is started."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import warm

PROGRAM = """
import os, signal, sys, time
from pathlib import Path

def stop(signum, frame):
    sys.exit(85)

signal.signal(signal.SIGTERM, stop)
print(os.environ["WORD"], *sys.argv[1:], Path.cwd().name, flush=True)
deed = sys.argv[1]
if deed == "waits":
    Path("pid").write_text(str(os.getpid()))
    time.sleep(60)
if deed == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "fails":
    raise RuntimeError("as it must")
sys.exit(int(deed))
"""


@pytest.fixture
def started(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(deed: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [warm.server().python, "-m", "program", deed],
            cwd=tmp_path,
            env=os.environ | {"WORD": "said"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def until(happens) -> None:
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("deed", "code"), [("0", 0), ("3", 3), ("fails", 1), ("dies", -signal.SIGKILL)])
def test_it_has_arguments_folder_environment_and_an_end(started, tmp_path: Path, deed: str, code: int) -> None:
    process = started(deed)
    out, err = process.communicate(timeout=60)
    assert out.split() == ["said", deed, tmp_path.name]
    assert process.returncode == code
    assert ("RuntimeError: as it must" in err) == (deed == "fails")


def test_signals_reach_it(started, tmp_path: Path) -> None:
    process = started("waits")
    until((tmp_path / "pid").exists)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 85


def test_it_dies_with_the_process_that_stands_for_it(started, tmp_path: Path) -> None:
    process = started("waits")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = (tmp_path / "pid").read_text()
    assert int(pid) != process.pid
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_what_is_no_module_is_run_by_the_real_python() -> None:
    said = subprocess.run([warm.server().python, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
    assert said.stdout == "42\n"
