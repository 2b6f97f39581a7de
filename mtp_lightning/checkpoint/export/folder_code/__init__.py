"""Modelling code that is copied into exported folders, for transformers to run there; nothing here imports it."""
