"""What a training step costs, measured: `mtp bench memory` and `mtp bench train`.

Both run real optimizer steps of a recipe on random tokens (`step.py`), for several numbers of offsets and schedules
side by side. Memory (`memory.py`) is measured in a fresh process per figure (`probe.py`, `peak.py`), time (`speed.py`)
in one process in interleaved rounds, next to the operations that the planner counts.
"""
