"""Python modules run as the ranks of one machine."""

import os

from mtp_lightning.launch.rank_env import free_port, local_rank_info
from tests.support import warm
from tests.support.runs import ROOT

TIMEOUT_S = 240


def on_ranks(module: str, num_ranks: int, *arguments: str) -> str:
    """Run a module as every rank; return what the first has printed once all have ended well."""
    port = free_port()
    processes = [
        warm.start(
            *arguments,
            cwd=ROOT,
            code=f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)",
            environment=os.environ | {"OMP_NUM_THREADS": "1"} | local_rank_info(rank, num_ranks, port).environment,
        )
        for rank in range(num_ranks)
    ]
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * num_ranks, (codes, [process.output(1)[-3000:] for process in processes])
    return processes[0].output()
