"""Train on ranks, each of which takes longer to have its rows than the one before; arguments as of `mtp train`."""

import os
import sys
import time

from mtp_lightning.cli.app import app
from mtp_lightning.training import lightning_module

SLOW_S = 0.6  # per rank; well above what a loaded machine takes for one's rows


def main(*arguments):
    prepare = lightning_module.prepare_batch

    def slowly(*args, **kwargs):
        time.sleep(SLOW_S * int(os.environ["RANK"]))
        return prepare(*args, **kwargs)

    lightning_module.prepare_batch = slowly
    app(["train", *arguments], standalone_mode=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
