"""Python modules run as the ranks of one machine."""

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack

from mtp_lightning.launch.rank_env import free_port, local_rank_info
from tests.support.runs import ROOT

TIMEOUT_S = 240


def on_ranks(module: str, num_ranks: int, *arguments: str) -> str:
    """Run a module as every rank; return what the first has printed once all have ended well.

    Output goes to files: a rank that fills a pipe while another is being read would hold all of them.
    """
    port = free_port()
    with ExitStack() as until_the_end:
        files = [[until_the_end.enter_context(tempfile.TemporaryFile()) for _ in "oe"] for _ in range(num_ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | local_rank_info(rank, num_ranks, port).environment,
                stdout=files[rank][0],
                stderr=files[rank][1],
            )
            for rank in range(num_ranks)
        ]
        try:
            codes = [process.wait(TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert codes == [0] * num_ranks, (codes, [_text(errors)[-3000:] for _, errors in files])
        return _text(files[0][0])


def _text(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
