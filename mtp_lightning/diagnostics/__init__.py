"""Checks of this machine, of the strategies, of a recipe before it runs, and of head kinds that users add."""
