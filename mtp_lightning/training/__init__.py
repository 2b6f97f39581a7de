"""Training: the step with its backward orders, the Lightning module, callbacks, and one entry point.

The only place that knows Lightning. One `training_step` is one optimizer step; its micro-batches are a loop
inside it, so that the step counter, checkpoints and accumulation cannot disagree.
"""
