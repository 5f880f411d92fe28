"""What the copy engine of Hopper (TMA) moves, described once for each layout."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Box:
    """A `TensorDescriptor` but for its memory.

    Triton checks a descriptor and its layout whenever one is made, some 10 us of the host; they
    follow from the layout, so that one check is enough.

    Args:
        shape: of the tensor as the copy engine sees it, up to five sides.
        strides: in elements, the last 1.
        block: sides of what one copy moves.
        layout: of that in shared memory.
        offset: elements of the tensor before the first that the copy engine sees.
    """

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        block: Sequence[int],
        layout: Any,
        offset: int = 0,
    ) -> None:
        self._arguments = (list(shape), list(strides), list(block), layout)
        self._offset = offset
        self._bytes = 0
        # All fields of a checked descriptor but its memory, which must not be kept alive.
        self._fields: dict[str, Any] | None = None

    def of(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor of `tensor`, checked: its memory must lie on a boundary of 16 bytes."""
        if self._offset:
            self._bytes = self._offset * tensor.element_size()
            tensor = tensor.as_strided((), (), tensor.storage_offset() + self._offset)
        made = TensorDescriptor(tensor, *self._arguments)
        self._fields = {name: value for name, value in vars(made).items() if name != "base"}
        return made

    def at(self, tensor: Tensor) -> TensorDescriptor:
        """The same without a check, once `of` has made one: for memory that is known to fit."""
        if self._fields is None:
            return self.of(tensor)
        made = object.__new__(TensorDescriptor)
        base = _Memory(tensor.data_ptr() + self._bytes) if self._bytes else tensor
        vars(made).update(self._fields, base=base)
        return made


class _Memory:
    """All that a launch asks of the tensor in a descriptor: a view takes longer to make."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address
