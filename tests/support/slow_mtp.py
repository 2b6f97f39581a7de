"""`mtp` whose steps take five seconds longer and more: a short run meets a time limit, and computes the same."""

import time

from mtp_lightning.cli.app import main
from mtp_lightning.launch.signals import StopRequest, stop_on_signals

LONGER_S = 5.4


def slow_down():
    """Let every step wait before it trains."""
    from mtp_lightning.training.lightning_module import MtpLightningModule

    training_step = MtpLightningModule.training_step

    def slow_step(self, batch, batch_idx):
        time.sleep(LONGER_S)
        training_step(self, batch, batch_idx)

    MtpLightningModule.training_step = slow_step


if __name__ == "__main__":
    with stop_on_signals(StopRequest()):  # as `mtp train` does, before torch is loaded
        slow_down()
        main()
