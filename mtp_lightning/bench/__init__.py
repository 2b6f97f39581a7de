"""What a training step costs, measured: `mtp bench memory` and `mtp bench train`.

Both run real optimizer steps of a recipe on random tokens (`training/step.py`), for several numbers of offsets and
backward orders side by side. Memory (`memory.py`) is measured in a fresh process per figure (`memory_probe.py`,
`peak_memory.py`), time (`speed.py`) in one process in interleaved rounds beside the operations that the planner counts.
"""
