"""A switch that pins launch settings: for tests, benchmarks, and to tell tuning from mathematics.

The tables in `configs.py` give one setting a key, so that nothing is tuned while a program runs;
inside `pinned(name=setting)` that setting is taken instead, in this thread or task.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeVar

Setting = TypeVar("Setting")

_PINS: ContextVar[Mapping[str, object]] = ContextVar(
    "lintra_pinned_launches", default=MappingProxyType({})
)


@contextmanager
def pinned(**settings: object) -> Iterator[None]:
    """Pins, for each kernel name, the setting that its table would have chosen."""
    token = _PINS.set({**_PINS.get(), **settings})
    try:
        yield
    finally:
        _PINS.reset(token)


def pin_or(name: str, setting: Setting) -> Setting:
    """The pinned setting of `name` if there is one, else `setting`."""
    return _PINS.get().get(name, setting)  # type: ignore[return-value]


def is_pinned() -> bool:
    """Whether any setting is pinned."""
    return bool(_PINS.get())
