"""Checkpoints that survive a kill at any moment: folders of safetensors and JSON, committed by one rename.

`tree` turns nested Python values into a JSON document and named tensors; `tensors` writes and reads
safetensors files; `folder` puts the two together; `layout` finds and verifies checkpoints; `commit` makes and
deletes; `manifest` says what a complete one holds; `lightning_io` plugs all into a Lightning trainer.
Nothing is ever pickled, so reading a checkpoint runs no code of its author.
"""
