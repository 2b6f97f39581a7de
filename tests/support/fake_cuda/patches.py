"""The Python side of a CUDA device that does nothing, and operators as a GPU runs them.

A build of torch for CPUs takes attention and RMSNorm apart in its own way, copies tensors out of the sight of
dispatch modes, and cannot exchange fake parameters. What stands in for that here does what the sources of torch 2.13
do on CUDA.
"""

import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is patched
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from tests.support.fake_cuda.guard import NUM_GPUS

MAKE_TENSOR, RMS_NORM, RUN_NORM = torch.tensor, torch.nn.functional.rms_norm, torch.ops.aten.mul.Tensor
DEEP_COPY, LIST = torch.Tensor.__deepcopy__, FakeTensor.tolist
SILENT = ("synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect")
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "get_device_capability": (9, 0),
    "get_device_name": "fake H100",
    "max_memory_allocated": 0,
    "memory_allocated": 0,
    "mem_get_info": (80 * 2**30, 80 * 2**30),
}


class Nothing:
    """A stream, an event, a device's properties: has every method, and none does anything."""

    major, minor, total_memory, multi_processor_count, name, uuid = 9, 0, 80 * 2**30, 132, "fake H100", "0"

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *args: object) -> None: ...


class PassedEvent(Nothing):
    """An event that has passed as soon as it is there."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "PassedEvent") -> float:
        return 0.0


def silent() -> Any:
    """Make a function that does nothing.

    Mocks would keep what they are called with; and torch's compiler has a table of functions, in which each must be of
    one kind.
    """
    return lambda *args, **kwargs: None


def torch_cuda(guard: ctypes.CDLL, num_gpus: int = NUM_GPUS) -> Iterator[Any]:
    """Yield patches under which `torch.cuda` speaks as on a node where some GPUs are seen."""

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if not 0 <= index < num_gpus:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        guard.set_current_device(index)

    def put(name: str, function: Any) -> Any:
        return mock.patch.object(torch.cuda, name, function)

    for name in SILENT:
        yield put(name, silent())
    for name, answer in ANSWERS.items():
        yield put(name, lambda *args, _answer=answer, **kwargs: _answer)
    yield put("device_count", lambda: num_gpus)
    for name in ("stream", "current_stream", "default_stream", "get_device_properties"):
        yield put(name, lambda *args, **kwargs: Nothing())
    yield put("get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    yield put("set_rng_state", lambda state: None)
    yield put("current_device", lambda: guard.current_device())
    yield put("set_device", set_device)
    yield put("Stream", Nothing)
    yield put("Event", PassedEvent)
    yield mock.patch("torch.cuda.nvtx._nvtx", Nothing())
    yield mock.patch("torch._subclasses.fake_tensor.init_gpu_context", silent())


def operators() -> Iterator[Any]:
    """Yield patches of operators that a build for CPUs does in another way."""
    functional = torch.nn.functional
    yield mock.patch.object(functional, "scaled_dot_product_attention", _attention)
    yield mock.patch.object(functional, "rms_norm", _rms_norm)
    yield mock.patch.object(torch, "tensor", _tensor)
    yield mock.patch("deepspeed.runtime.zero.partition_parameters._orig_torch_tensor", _tensor)  # put back by zero.Init
    yield mock.patch.object(torch.Tensor, "new_tensor", _new_tensor)
    yield mock.patch.object(torch.Tensor, "record_stream", silent())
    yield mock.patch.object(torch.Tensor, "pin_memory", lambda self, device=None: self)
    yield mock.patch.object(torch.Tensor, "numpy", _zeros_of_numpy)
    yield mock.patch.object(FakeTensor, "tolist", lambda self: LIST(self.cpu()))  # one copy, not one for each entry
    yield mock.patch.object(torch.utils, "swap_tensors", _swap)
    yield mock.patch.object(torch, "set_rng_state", silent())  # read from a file under the mode, it has no values
    yield mock.patch.object(torch.Tensor, "__deepcopy__", _deep_copy)
    yield mock.patch.object(torch, "inference_mode", _no_grad)  # under it nothing is taken apart


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    """Choose a kernel as CUDA does: flash without a mask and below fp32, else the memory-efficient one."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    assert attn_mask is None or attn_mask.device == query.device, (attn_mask.device, query.device)
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]


class _FusedRmsNorm(torch.autograd.Function):
    """Keeps its input and one number per row, as the fused kernel."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32))
        return RUN_NORM(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden, *_ = ctx.saved_tensors
        return RUN_NORM(gradient, hidden), (gradient * hidden).flatten(0, -2).sum(0)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Fused where types agree, which under autocast is fp32."""
    if torch.is_autocast_enabled("cuda") and weight is not None:
        input, weight = input.to(torch.float32), weight.to(torch.float32)
    if input.device.type == "cuda" and weight is not None and weight.dtype == input.dtype:
        return _FusedRmsNorm.apply(input, weight)
    return RMS_NORM(input, normalized_shape, weight, eps)


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    """Make a tensor on the host, and copy it."""
    made = MAKE_TENSOR(data, dtype=dtype, device="cpu", **kwargs)
    target = torch.device(device) if device is not None else torch.empty(0).device
    if isinstance(made, FakeTensor):
        made.constant = None  # else the mode would copy the value to a device that is not there
    return made if target.type == "cpu" else made.to(target)


def _new_tensor(self: Any, data: Any, *, dtype: Any = None, device: Any = None) -> Any:
    return _tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def _zeros_of_numpy(self: Any, **kwargs: Any) -> Any:
    """Give a fake tensor's values as zeros; what is not on the host is refused as torch does."""
    if not isinstance(self, FakeTensor):
        return torch._C.TensorBase.numpy(self, **kwargs)
    if self.device.type != "cpu":
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    import numpy as np

    return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))


def _no_grad(mode: bool = True) -> Any:
    return torch.no_grad()


def _deep_copy(self: Any, memo: Any) -> Any:
    """Copy a fake tensor alone: by itself torch copies the mode that it belongs to as well; a real one for real."""
    if not isinstance(self, FakeTensor):
        with unset_fake_temporarily():
            return DEEP_COPY(self, memo)
    return self.detach().clone().requires_grad_(self.requires_grad)


def _swap(old: Any, new: Any) -> None:
    """`Module.to` and its like cannot exchange fake tensors; models are built where they belong.

    They leave the device when a fit ends, and are let go then.
    """
    if not old.numel():
        old.data = new.detach()  # what ZeRO-3 has taken apart
        return
    assert new.device.type == "cpu" or (old.device, old.dtype) == (new.device, new.dtype), (
        f"{old.device}, {old.dtype} becomes {new.device}, {new.dtype}"
    )


def fake_group(num_ranks: int, rank: int) -> None:
    """Form a process group whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
