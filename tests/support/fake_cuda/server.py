"""A process with a fake GPU that has torch, Lightning and DeepSpeed imported, and forks for every job.

Reads a job per line from its input, as JSON, and writes its outcome as a line: the result, or a traceback. A job has
a process of its own: DeepSpeed remembers its groups for as long as a process lives.
"""

import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    from tests.support.fake_cuda.guard import load

    os.environ["DS_ACCELERATOR"] = "cuda"
    with tempfile.TemporaryDirectory() as folder:
        guard = load(Path(folder))
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes elsewhere
        from tests.support.fake_cuda.jobs import run

        gc.freeze()  # what is imported need not be looked through in every job
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(json.dumps(_forked(lambda name=name, arguments=arguments: run(name, guard, **arguments))), file=out)
            out.flush()


def _forked(job: Any) -> dict[str, Any]:
    """Run a job in a child; return its result, or its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            outcome = {"result": job()}
        except BaseException:
            lines = traceback.format_exc().splitlines()
            outcome = {"error": "\n".join(line for line in lines if "registered at" not in line)}  # of operators
        with os.fdopen(writing, "w") as pipe:
            json.dump(outcome, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"ended with status {status}"}


if __name__ == "__main__":
    main()
