"""A run on paper: parameters, operations, memory, time and cost, from a recipe alone and without torch.

`counts.py` counts parameters as the meta-device model does, exactly; `flops.py` counts the operations of a training
step the way published model FLOPs utilisation (MFU) does, from `passes.py`, which follows a position forward and
backward through what is trained and what is frozen (`trained.py`); `hardware.yaml` says what a device can do at best;
`variants.py` asks the same of a recipe with another number of offsets.

`mtp plan` rests on two plain values: a `Shape` (`shape.py`), which is a recipe's model or a published one, and a
`Layout` (`layout.py`), which is how a step is cut up and spread. From these `memory.py` counts bytes per GPU and
`throughput.py` predicts seconds per step; `report.py` puts a whole plan together.

A new head kind needs a row in `counts.BESIDES_LAYERS`; the law that compares with the real model fails until then.
"""
