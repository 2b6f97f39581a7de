"""A run on paper: parameters, operations and peaks, from a recipe alone and without torch.

`counts.py` counts parameters as the meta-device model does, exactly; `flops.py` counts the operations of a training
step the way published model FLOPs utilisation (MFU) does; `hardware.yaml` says what a device can do at best;
`variants.py` asks the same of a recipe with another number of offsets.

A new head kind needs a row in `counts.BESIDES_LAYERS`; the law that compares with the real model fails until then.
"""
