"""Python modules run as the ranks of one machine."""

import os
import subprocess
import sys

from mtp_lightning.launch.seat import free_port, local_seat
from tests.support.runs import ROOT

TIMEOUT_S = 240


def on_ranks(module: str, num_ranks: int, *arguments: str) -> str:
    """Run a module as every rank; return what the first has printed once all have ended well."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | local_seat(rank, num_ranks, port).environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * num_ranks, (codes, [errors[-3000:] for _, errors in outputs])
    return outputs[0][0]
