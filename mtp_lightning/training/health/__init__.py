"""Watch a run: drift of the main head, losses that are not finite and the rollback behind them."""
