"""`mtp` whose training steps take two seconds longer, so that a short run meets a time limit; it computes the same."""

import time

from mtp_lightning.cli import main
from mtp_lightning.training.lightning_module import MtpLightningModule

LONGER_S = 2.0
training_step = MtpLightningModule.training_step


def slow_step(self, batch, batch_idx):
    """Wait, then train."""
    time.sleep(LONGER_S)
    training_step(self, batch, batch_idx)


if __name__ == "__main__":
    MtpLightningModule.training_step = slow_step
    main()
