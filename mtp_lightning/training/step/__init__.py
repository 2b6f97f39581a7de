"""One training step: batch, losses, backward order, checks, optimizer."""
