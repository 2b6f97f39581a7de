"""Watching a run: drift, divergence, hangs, stragglers, early stop."""
