"""Checks of a machine and of ourselves: parity of strategies, reference loop, preflight."""
