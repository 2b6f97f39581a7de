"""One training step: prepare the batch, count over ranks, go backward micro-batch by micro-batch, check, step, measure.

Read `batch.py`, `vote.py`, `objective.py` and `backward_order.py` beside `training/lightning_module.py`.
"""
