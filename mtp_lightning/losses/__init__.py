"""Losses: targets of every offset, cross-entropy in chunks that never hold (T, V), and offset weights.

Every fast way has a slow one beside it that defines what is meant: `targets.oracle_targets` for the shifted,
masked, document-bounded targets, `reference.py` for the losses. Tests hold the two equal; training compares the
targets of its first batches itself.
"""
