"""The precision rule of every operation: states and sums in float32, float64 for float64 inputs."""

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and sums for inputs of `dtype`; half sums overflow or lose digits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast does not lower the precision of an operation's inner products."""
    # torch.compile of 2.11 cannot trace torch.amp.is_autocast_available.
    if device_type == "meta":
        return nullcontext()  # it has none to switch off
    # A graph may run under another autocast than it was traced under.
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()  # in a tenth of the time
    return torch.autocast(device_type, enabled=False)
