"""One thread per process: tiny tensors gain nothing from more, and tests share the machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
