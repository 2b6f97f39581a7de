"""Shards of text that a model has generated itself."""
