"""Outputs of attention layers, taken while a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Output = Tensor | tuple[Tensor, ...]


class AttentionOutputs:
    """Records what attention layers give, and puts other outputs in their place if told to.

    The hooks stay on the model; they do nothing outside of `recording`. Gradient checkpointing
    computes blocks again during the backward pass: such a run is not recorded, and replacements
    stay until `release`, so that it repeats the first.

    Args:
        model: the transformer, before it is wrapped for several processes.
        names: of its attention layers.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names = list(names)
        self._outputs: dict[str, Output] = {}
        self._replacements: dict[str, Output] | None = None
        self._is_recording = False
        for name in self.names:
            model.get_submodule(name).register_forward_hook(partial(self._hook, name))

    def _hook(self, name: str, module: nn.Module, inputs: Any, output: Output) -> Output | None:
        if self._is_recording:
            self._outputs[name] = output
        return None if self._replacements is None else self._replacements[name]

    @contextmanager
    def recording(self, replacements: "AttentionOutputs | None" = None) -> Iterator[None]:
        """Context in which outputs are recorded.

        Args:
            replacements: recorded outputs of another model that the layers give instead.
        """
        self.release()
        self._replacements = None if replacements is None else replacements._outputs
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def release(self) -> None:
        """Forgets outputs and replacements, after the backward pass."""
        self._outputs = {}
        self._replacements = None

    def taken(self) -> list[Tensor]:
        """The outputs of the last recording, ``(B, N, C)`` each, in the order of the names.

        Text and image of a joint layer are put into one tensor.
        """
        found = [self._outputs[name] for name in self.names]
        return [out if isinstance(out, Tensor) else torch.cat(out, dim=1) for out in found]
