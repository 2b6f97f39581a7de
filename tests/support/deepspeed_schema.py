"""The keys that the installed DeepSpeed reads, from its pydantic models and from what it asks a configuration for."""

import contextlib
import enum
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel

SECTIONS = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
    "wandb": "deepspeed.monitor.config.WandbConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "comet": "deepspeed.monitor.config.CometConfig",
    "compile": "deepspeed.compile.config.CompileConfig",
    "hybrid_engine": "deepspeed.runtime.config.HybridEngineConfig",
}
"""Sections at the top level that are read as a pydantic model of the same keys."""
OF_VALUE = {bool: "bool", int: "int", float: "float", str: "text", dict: "mapping", list: "list"}


class Asked(dict[str, Any]):
    """An empty configuration that notes what it is asked for."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given)
        self.noted: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.noted.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.noted.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.noted.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asked":
        return self


def installed_keys() -> dict[str, Any]:
    """Return the type of every key, nested where DeepSpeed has a model; `any` where it says nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(asked)
    keys: dict[str, Any] = {key: _type_of_default(key) for key in asked.noted}
    for key in (key for key, kind in keys.items() if kind == "any"):
        below = Asked()
        with contextlib.suppress(Exception):  # it was no section, or is one that must not be empty
            DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1, **{key: below}))
        keys[key] = dict.fromkeys(sorted(below.noted), "any") or "any"
    return dict(sorted((keys | {key: _of_model(_find(path)) for key, path in SECTIONS.items()}).items()))


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _type_of_default(key: str) -> str:
    """Look up the default that a module of constants gives for a key, by the name of the constant."""
    from deepspeed.runtime import constants

    for name, value in vars(constants).items():
        if value == key and f"{name}_DEFAULT" in vars(constants):
            return OF_VALUE.get(type(vars(constants)[f"{name}_DEFAULT"]), "any")
    return "any"


def _of_model(model: type[BaseModel]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        allowed = sorted({*_types(field.annotation)})
        nested = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        least = next((limit.ge for limit in field.metadata if isinstance(limit, annotated_types.Ge)), None)
        value: Any = " | ".join(allowed) + (f" >= {least}" if least is not None else "")
        for key in {name, field.alias or name}:
            keys[key] = {"": value, **_of_model(nested[0])} if nested else value
    return dict(sorted(keys.items()))


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _types(annotation: Any) -> Iterator[str]:
    for part in _parts(annotation):
        kind = get_origin(part) or part
        if kind is Literal:
            yield from map(str, get_args(part))
        elif not isinstance(kind, type):
            yield "any"
        elif issubclass(kind, enum.Enum):
            yield from ("int" if isinstance(choice.value, int) else str(choice.value) for choice in kind)
        elif issubclass(kind, BaseModel | dict):
            yield "mapping"
        elif issubclass(kind, list | tuple | set):
            yield "list"
        else:
            yield "text" if issubclass(kind, Path) else "null" if kind is type(None) else OF_VALUE.get(kind, "any")
