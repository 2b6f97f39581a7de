"""What a step does to a device that is not there: memory, collectives, and values that the host is given."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
OF_UNKNOWN_LENGTH = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
QUESTIONS_OF_OVERFLOW = ("overflow", "inf_or_nan")
YES = ("_probe",)  # asks whether gradients are finite
PLACES = ("_probe", "after_step")  # ask where the largest is, and look there
CALLERS = 6  # frames that tell what a value is asked for
PACKAGE = "/mtp_lightning/"
LAUNCH_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::resize_"}
PICKING = {"aten::gather", "aten::embedding", "aten::index", "aten::index_select", "aten::slice_backward"}
"""Operators that read of their largest operand only as much as they write."""
PLACING = {"aten::scatter_add_", "aten::index_copy_", "aten::index_put_", "aten::_index_put_impl_"}
"""And those that write of it only what they are given."""
COPIES, PRODUCTS = {"aten::_to_copy", "aten::copy_"}, {"aten::mm", "aten::addmm", "aten::bmm"}
BYTES_PER_S, FLOPS_PER_S, KERNEL_S = 3.0e12, {torch.bfloat16: 650e12, torch.float16: 650e12}, 2.5e-6
EXACT_FLOPS_PER_S = 50e12
"""What an H100 SXM reaches in long copies and large products, and what a kernel takes at least."""
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::multinomial"}
"""The last asks twice whether its weights are such, out of the sight of dispatch modes."""


class Collective(NamedTuple):
    """A call that all ranks must make."""

    name: str
    device: str
    shape: tuple[int, ...]
    dtype: str


class Ledger(TorchDispatchMode):
    """Books what reaches the device.

    Attributes:
        live, peak: bytes of CUDA tensors that are alive, and their maximum since `reset`.
        collectives: in their order, since `reset`.
        products: types of what is multiplied in matrix products on the device, by how often.
        held: by line of the package, the bytes it took that are alive when `watch_bytes` are, if that is given.
        launches, moved: by line of the package, kernels that eager torch launches and bytes that they read and write,
            since `reset`. Views launch none.
        seconds: by kind of kernel and line, what they take at the rates above: as long as their bytes or operations do,
            the longer of both. Attention counts all positions, of which causal kernels skip half.
        waits: by what is asked for and the function, how often the host waits for the device, since `reset`.
    """

    def __init__(self, watch_bytes: float | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.watch_bytes = watch_bytes
        self.held = Counter[str]() if watch_bytes else None
        self._storages: dict[int, tuple[int, Any, str]] = {}  # by address: size, a weak reference, who took it
        self.reset()

    def reset(self) -> None:
        """Forget what was, but not what is alive."""
        self.peak = self.live
        self.collectives: list[Collective] = []
        self.products = Counter[str]()
        self.launches, self.moved, self.waits = Counter[str](), Counter[str](), Counter[str]()
        self.seconds = Counter[str]()

    def note(self, name: str, tensor: torch.Tensor | None = None) -> None:
        """Book a collective that does not come by as an operator."""
        if tensor is None:
            self.collectives.append(Collective(name, "cpu", (), "object"))
        else:
            self.collectives.append(Collective(name, str(tensor.device), tuple(tensor.shape), str(tensor.dtype)))

    def wait(self, what: str) -> None:
        """Book that the host waits for the device."""
        self.waits[f"{what} {_function()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.startswith("prim::"):
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if name in WAITING and given[0].is_cuda:
            self.wait(name.removeprefix("aten::"))
        if func is aten._local_scalar_dense.default:
            return _value(args[0].dtype)
        if func in OF_UNKNOWN_LENGTH:
            source, rows = args[0], max(1, args[0].shape[0] if args[0].dim() else 1)
            shape = (rows, source.dim()) if func is aten.nonzero.default else (rows,)
            return source.new_empty(shape, dtype=torch.int64)
        if name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            args = (args[0], [_chosen(i) for i in args[1]])
        if name in ("aten::exponential_", "aten::uniform_"):
            kwargs = {}  # there is no rule for generators
        # a sum made inside the product has no kernel for tensors without memory
        result = kwargs["out"] if func is aten.addmm.dtype_out else func(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        self._note_work(func, name, args, kwargs, given, made, result)
        for leaf in made:
            if leaf.device.type == "cuda":
                self._hold(leaf.untyped_storage())
        return result

    def _note_work(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        given: list[torch.Tensor],
        made: list[torch.Tensor],
        result: Any,
    ) -> None:
        """Book a collective, a kernel, a copy that the host waits for, a product."""
        if name.startswith("c10d::"):
            self.note(name.removeprefix("c10d::"), given[0])
        if any(leaf.is_cuda for leaf in (*given, *made)) and not func.is_view and name not in LAUNCH_NOTHING:
            self._book(name, given, made, _operations(func, args, kwargs, result))
        blocks = name in COPIES and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        if blocks and {given[-1].device.type, made[0].device.type} == {"cpu", "cuda"}:
            self.wait(f"copy to {made[0].device.type}")
        if name in PRODUCTS and made[0].device.type == "cuda":
            left = args[1 if name == "aten::addmm" else 0]
            self.products[str(left.dtype).removeprefix("torch.")] += 1

    def _book(self, name: str, given: list[torch.Tensor], made: list[torch.Tensor], flops: int) -> None:
        read = {id(leaf): leaf for leaf in given}.values()  # what a product is written to comes twice
        sizes = sorted(leaf.nbytes for leaf in (*read, *made) if leaf.is_cuda)
        moved = 2 * sum(sizes[:-1]) if name in PICKING else 2 * sum(sizes[:-2]) if name in PLACING else sum(sizes)
        multiplied = given[1 if name == "aten::addmm" else 0] if flops else None  # not what is added to
        computing_s = flops / FLOPS_PER_S.get(multiplied.dtype, EXACT_FLOPS_PER_S) if multiplied is not None else 0.0
        where = _where()
        self.launches[where] += 1
        self.moved[where] += moved
        self.seconds[f"{_kind(name, flops)} {where}"] += max(moved / BYTES_PER_S, computing_s, KERNEL_S)

    def _hold(self, storage: Any) -> None:
        size, known, _ = self._storages.get(storage._cdata, (0, None, ""))
        if known is not None and known() is storage:
            return
        self.live += storage.nbytes() - size  # another one may have been at this address
        self.peak = max(self.peak, self.live)
        where = _where() if self.held is not None else ""
        self._storages[storage._cdata] = storage.nbytes(), weakref.ref(storage), where
        weakref.finalize(storage, self._free, storage._cdata, id(storage))
        if self.watch_bytes and self.live >= self.watch_bytes:
            self.watch_bytes = None
            for held, _, where in self._storages.values():
                self.held[where] += held

    def _free(self, key: int, number: int) -> None:
        size, known, _ = self._storages.get(key, (0, None, ""))
        if known is not None and (known() is None or id(known()) == number):
            self.live -= size
            del self._storages[key]


def _operations(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    counter = flop_registry.get(func.overloadpacket)
    if counter is None:
        return 0
    if func.overloadpacket == aten.addmm:
        args, kwargs = args[:3], {}  # types come next
    return int(counter(*args, **kwargs, out_val=result))


def _kind(name: str, flops: int) -> str:
    if "attention" in name:
        return "attention"
    if "adam" in name or "foreach" in name or name.startswith("c10d"):
        return "update"
    return "products" if flops else "elementwise"


def _value(dtype: torch.dtype) -> Any:
    """Answer the host: no to yes-or-no questions and to those for overflow; the first of places; else one."""
    names = [frame.f_code.co_name for frame in _frames(CALLERS)]
    if dtype == torch.bool:
        return any(name in YES for name in names)
    if any(word in name for word in QUESTIONS_OF_OVERFLOW for name in names):
        return 0
    if not dtype.is_floating_point and any(name in PLACES for name in names):
        return 0
    return 1.0 if dtype.is_floating_point else 1


def _chosen(index: Any) -> Any:
    """All positions stand in for those that a mask would choose."""
    if index is None or index.dtype != torch.bool:
        return index
    assert index.dim() == 1, "masks of one dimension only"
    return torch.zeros(index.shape, dtype=torch.int64, device=index.device)


def _where() -> str:
    for frame in _frames(60):
        path = frame.f_code.co_filename
        if PACKAGE in path and "site-packages" not in path:
            return f"{path.split(PACKAGE)[-1]}:{frame.f_lineno}"
    return "autograd, optimizer or library"


def _function() -> str:
    """Name the file and function of the package that something happens in."""
    for frame in _frames(60):
        path = frame.f_code.co_filename
        if PACKAGE in path and "site-packages" not in path:
            return f"{path.split(PACKAGE)[-1]} {frame.f_code.co_name}"
    return "library"


def _frames(most: int) -> Iterator[Any]:
    frame = sys._getframe(3)
    for _ in range(most):
        if frame is None:
            return
        yield frame
        frame = frame.f_back
