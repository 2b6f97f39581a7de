"""Checks of this machine and of the strategies: parity with a plain loop, and the preflight of a recipe."""
