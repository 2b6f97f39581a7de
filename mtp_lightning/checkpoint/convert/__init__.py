"""Whole models from checkpoints: load, consolidate, merge LoRA, add heads."""
