"""Reads checkpoints without running any of their code: foreign objects become inert stand-ins.

The official containers pickle a yacs configuration beside the weights, which
``torch.load(weights_only=True)`` refuses and a plain ``torch.load`` would execute.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from safetensors.torch import load_file

_REBUILDERS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
_DTYPES = (
    "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8",
)  # fmt: skip

# Everything a state dict consists of; nothing here calls back into the file's own names.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **{("torch._utils", name): getattr(torch._utils, name) for name in _REBUILDERS},
}


class InertObject(dict):
    """Stands for an object of an unknown class: keeps items and state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "InertObject":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, item: Any) -> None:
        """Items of a list subclass are dropped."""

    def extend(self, items: Any) -> None:
        """Items of a list subclass are dropped."""

    def add(self, item: Any) -> None:
        """Items of a set subclass are dropped."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name), InertObject)


def _load(file: IO[bytes], **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


def _loads(data: bytes, **kwargs: Any) -> Any:
    return _load(io.BytesIO(data), **kwargs)


# What torch.load asks of a `pickle_module`.
_PICKLE = SimpleNamespace(
    __name__="lintra_inert_pickle",
    Unpickler=_Unpickler,
    load=_load,
    loads=_loads,
    UnpicklingError=pickle.UnpicklingError,
)


def read_checkpoint_file(path: str | Path) -> Any:
    """The contents of a ``.safetensors`` file or of one that torch.save wrote, on the CPU.

    Objects that are not tensors, numbers, strings or plain containers come as `InertObject`; none
    of their code is imported or run.

    Raises:
        ValueError: no such file, or one that is cut off or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be an existing file, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except Exception as error:  # zip, pickle, safetensors and torch each have their own
        raise ValueError(
            f"`checkpoint` must be a whole file of torch.save or safetensors, got {str(path)!r}:"
            f" {error}"
        ) from error
