"""What torch makes of the weights in a run's checkpoints, against the average that the run has kept."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.write_shards import AVERAGE


def assert_average_of_steps(run, steps, *, decay):
    """There must be a checkpoint of every step that the average was updated at; that of the last is compared."""
    readers = [ShardReader(run / f"checkpoints/step-{step:08d}") for step in steps]
    names, last = readers[0].names, readers[-1]
    parameters = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(last.numel(name))) for name in names])
    oracle = AveragedModel(parameters, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for reader in readers:
        for parameter, name in zip(parameters, names, strict=True):
            parameter.data = reader.read(name)
        oracle.update_parameters(parameters)
    lag = 0.0
    for expected, name in zip(oracle.module, names, strict=True):
        assert torch.allclose(last.read(name, AVERAGE), expected.data, rtol=1e-6, atol=1e-7), name
        lag = max(lag, float((last.read(name) - expected.data).abs().max()))
    assert lag > 1e-3, "the weights have moved"
