"""Batches for training: data module, datasets, streams."""
