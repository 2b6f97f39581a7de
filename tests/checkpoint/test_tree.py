import json
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.checkpoint.format.state_tree import decode, encode
from mtp_lightning.errors import CheckpointError


def round_trip(value: Any) -> Any:
    document, tensors = encode(value)
    return decode(json.loads(json.dumps(document, allow_nan=False)), tensors)


def is_same(a: Any, b: Any) -> bool:
    """Equality that also compares types, nan, signed zero, key order and dtypes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return repr(a) == repr(b)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8)


numbers = st.integers() | st.floats() | st.booleans() | st.none()
leaves = (
    numbers
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.floats(width=32), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float32))
    | st.lists(st.booleans(), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.bool))
    | st.integers(0, 2**32 - 1).map(lambda value: np.array([value], np.uint32))
    | st.floats(width=32).map(np.float32)
)
keys = st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "$", "a/b", "__metadata__"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=300, deadline=None)
def test_decode_undoes_encode(value: Any) -> None:
    assert is_same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        (),
        {"a": {}, "b": OrderedDict()},
        {0: 1, "0": 2},
        {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"__metadata__": torch.ones(2)},
        {"$tensor": "not a tensor"},
        [float("-inf"), float("nan"), -0.0, 5e-324, 2**70],
        (3, tuple(range(5)), None),
        torch.arange(12).reshape(3, 4).T,
        torch.arange(6).to(torch.uint8)[::2],
        torch.tensor(True),
        torch.empty(0, 3),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(3, dtype=torch.bfloat16),
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.float64("nan"),
        np.bool_(True),
        "\ud800 lone surrogate",
        np.random.RandomState(1).get_state(legacy=False),
    ],
    ids=repr,
)
def test_special_values_come_back_exactly(value: Any) -> None:
    assert is_same(round_trip(value), value)


def test_a_tensor_met_twice_is_stored_once_and_stays_one() -> None:
    weight = torch.ones(3)
    document, tensors = encode({"embedding": weight, "unembedding": weight, "part": weight[:2]})
    assert list(tensors) == ["embedding", "part"]
    value = decode(document, tensors)
    assert value["embedding"] is value["unembedding"]
    assert torch.equal(value["part"], weight[:2])


def test_tensors_are_not_copied() -> None:
    weight = torch.ones(3)
    _, tensors = encode({"weight": weight})
    assert tensors["weight"].data_ptr() == weight.data_ptr()


def test_module_versions_of_a_state_dict_survive() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert round_trip(state)._metadata == state._metadata


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"callbacks": {"Watch": [Path("x")]}}, "PosixPath at callbacks/Watch/0"),
        ({"a": {1.5: 0}}, "float as the key 1.5 at a"),
        ({"a": {True: 0}}, "bool as the key True at a"),
        ({"a": OrderedDict({None: 0})}, "NoneType as the key None at a"),
        ([Colour.RED], "Colour at 0"),
        ([namedtuple("Point", "x")(1)], "Point at 0"),
        ({"a": Counter()}, "Counter at a"),
        ([{1, 2}], "set at 0"),
        ([print], "builtin_function_or_method at 0"),
        ([1 + 2j], "complex at 0"),
        ([np.str_("a")], "str_ of <U1 at 0"),
        ([np.array([object()])], "ndarray of object at 0"),
        ([np.arange(3, dtype=">i4")], "ndarray of >i4 at 0"),
        ([np.ma.masked_array([1])], "MaskedArray at 0"),
        ({"w": torch.ones(2).to_sparse()}, "torch.sparse_coo tensor of torch.float32 on cpu at w"),
        ({"w": torch.ones(2, device="meta")}, "torch.strided tensor of torch.float32 on meta at w"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "tensor of torch.complex128 on cpu at w"),
        (Path("x"), "PosixPath at the top"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_exact_form_is_refused_by_path_and_type(value: Any, found: str) -> None:
    with pytest.raises(CheckpointError) as failure:
        encode(value)
    assert failure.value.found.endswith(found)
