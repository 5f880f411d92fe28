"""What time and class say to the blocks of a LiT, for all blocks at once."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from torch import Tensor, nn

from lintra.kernels import TensorTable, stacked_linear

from ..untouched import has_global_hooks, is_unhooked, on_gpu
from .lit_block import LiTBlock

# What makes the condition of a block, and of which kind each part must be.
_PARTS: dict[str, type[nn.Module]] = {
    "norm1.emb.timestep_embedder": TimestepEmbedding,
    "norm1.emb.timestep_embedder.linear_1": nn.Linear,
    "norm1.emb.timestep_embedder.act": nn.SiLU,
    "norm1.emb.timestep_embedder.linear_2": nn.Linear,
    "norm1.emb.class_embedder": LabelEmbedding,
    "norm1.emb.class_embedder.embedding_table": nn.Embedding,
    "norm1.silu": nn.SiLU,
    "norm1.linear": nn.Linear,
}
_LINEARS = [name for name, kind in _PARTS.items() if kind is nn.Linear]
# The parameters of a kind, and which of its attributes are their sides.
_PARAMETERS: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    nn.Linear: {"weight": ("out_features", "in_features"), "bias": ("out_features",)},
    nn.Embedding: {"weight": ("num_embeddings", "embedding_dim")},
}
_LABELS = "norm1.emb.class_embedder"
_ROWS = "norm1.emb.class_embedder.embedding_table"
# Options of these modules that a DiT leaves out.
_EXTRAS = ("cond_proj", "post_act", "max_norm", "padding_idx", "scale_grad_by_freq", "sparse")
# Measured up to 32 samples. With many more the GPU's own work hides the host's, and the kernel
# reads its weights again for every 64 of them.
_MAX_BATCH = 128


class BlockConditions:
    """``m_l = W_l silu(time_l + label_l) + b_l`` of every block l by three launches.

    A block's own layers are eight calls on a few numbers each, a third of what the host does for a
    block, as much again for their gradients, and mostly the GPU waits for the host. Computed so
    wherever calling them is no more than that: on a GPU, nothing hooked, adapted, quantised or
    compiled as a whole. Labels that blocks drop by chance in training are drawn for all at once.

    Belongs to one model, and is no part of its state.
    """

    def __init__(self) -> None:
        self._layers: _Layers | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # a copy of the model has its own tensors

    def __call__(
        self, blocks: nn.ModuleList, time_features: Tensor, class_labels: Tensor | None
    ) -> Sequence[Tensor | None]:
        """The modulation of each block.

        Args:
            blocks: of `LiTBlock`.
            time_features: ``(B, 256)``, see `LiTBlock`.
            class_labels: ``(B,)`` int64.

        Returns:
            ``(B, 6 C)`` for each block, or None for a block that has to compute it.
        """
        layers = self._usable(blocks, time_features, class_labels)
        if layers is None or class_labels is None:
            return [None] * len(blocks)
        return layers(time_features, class_labels)

    def _usable(
        self, blocks: nn.ModuleList, time_features: Tensor, class_labels: Tensor | None
    ) -> "_Layers | None":
        if torch.compiler.is_compiling():
            return None
        if not on_gpu(time_features):
            # Weights that have been replaced since must not be held.
            self._layers = None
            return None
        if (
            class_labels is None
            or class_labels.dtype != torch.int64
            or class_labels.device != time_features.device
            or class_labels.shape != time_features.shape[:1]
            or len(class_labels) > _MAX_BATCH
            or has_global_hooks()
        ):
            return None
        layers = self._layers
        if layers is None or not layers.are_current(blocks):
            # No CUDA graph may hold the sending of addresses.
            capturing = time_features.is_cuda and torch.cuda.is_current_stream_capturing()
            layers = self._layers = None if capturing else _layers_of(blocks)
        if (
            layers is None
            or layers.device != time_features.device
            or layers.dtype_of_products(time_features) is None
            or layers.drops_differ()
        ):
            return None
        return layers


class _Layers:
    """The layers of all blocks by kind, and what must stay so that they are what blocks call.

    Raises:
        ValueError: layers that differ in shape or device from block to block.
        TypeError: or in dtype.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks, self._count = blocks, len(blocks)
        parts = [{name: block.get_submodule(name) for name in _PARTS} for block in blocks]
        modules = [*blocks, *(module for part in parts for module in part.values())]
        # Dictionaries that modules keep for life: to look into them costs a tenth of asking
        # hundreds of modules for their attributes.
        self._insides = [module.__dict__ for module in modules]
        self._absent = [(m.__dict__, name) for m in modules for name in _EXTRAS if hasattr(m, name)]
        self._places = [(blocks._modules, str(index), block) for index, block in enumerate(blocks)]
        self._places += [place for block in blocks for place in _places_of(block)]
        self._label_embedders: list[Any] = [part[_LABELS] for part in parts]
        wanted = [(name, kind) for name in _LINEARS for kind in ("weight", "bias")]
        self._sources, self._tables = [], []
        for name, kind in [*wanted, (_ROWS, "weight")]:
            source: list[tuple[dict[str, Any], str]]
            source = [(part[name]._parameters, kind) for part in parts]
            self._sources.append(source)
            self._tables.append(TensorTable(name, [place[kind] for place, _ in source]))
            self._tables[-1].addresses()  # now, and not within a CUDA graph
        first = self._tables[0]
        self.dtype, self.device = first.dtype, first.device
        if any(table.dtype != self.dtype for table in self._tables):
            raise TypeError("the layers of a block differ in dtype")
        if any(table.device != self.device for table in self._tables):
            raise ValueError("the layers of a block differ in device")

    def are_current(self, blocks: nn.ModuleList) -> bool:
        return (
            blocks is self._blocks
            and len(blocks) == self._count
            and all(place.get(name) is module for place, name, module in self._places)
            and not any(
                inside["_forward_hooks"]
                or inside["_forward_pre_hooks"]
                or inside["_backward_hooks"]
                or inside["_backward_pre_hooks"]
                or "forward" in inside
                or "token_drop" in inside
                for inside in self._insides
            )
            and not any(_is_set(inside.get(name, self)) for inside, name in self._absent)
            and all(
                table.is_current([place.get(kind) for place, kind in source])
                for table, source in zip(self._tables, self._sources, strict=True)
            )
        )

    def dtype_of_products(self, x: Tensor) -> torch.dtype | None:
        """In which calling the layers with x multiplies; None if not in theirs or autocast's."""
        kind = x.device.type
        if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return dtype if self.dtype in (dtype, torch.float32) else None
        return x.dtype if x.dtype == self.dtype else None

    def drops_differ(self) -> bool:
        """Whether one block replaces labels by "no class" more often than another."""
        return len({_drop_of(embedder) for embedder in self._label_embedders}) > 1

    def _dropped(self, class_labels: Tensor) -> Tensor:
        """Labels of which each block replaces its own, by chance, as `LabelEmbedding` does."""
        chance, no_class = _drop_of(self._label_embedders[0])
        if chance == 0:
            return class_labels
        drawn = torch.rand(self._count, len(class_labels), device=class_labels.device)
        return torch.where(drawn < chance, no_class, class_labels)

    def __call__(self, time_features: Tensor, class_labels: Tensor) -> Sequence[Tensor]:
        weight_1, bias_1, weight_2, bias_2, weight, bias, rows = self._tables
        labels, dtype = self._dropped(class_labels), self.dtype_of_products(time_features)
        options: dict[str, Any] = {"dtype": dtype, "separate": torch.is_grad_enabled()}
        hidden = stacked_linear(time_features, weight_1, bias_1, silu=True, **options)
        condition = stacked_linear(
            hidden, weight_2, bias_2, rows=rows, labels=labels, silu=True, **options
        )
        return stacked_linear(condition, weight, bias, dtype=dtype, separate=True)  # type: ignore[return-value]


def _is_set(option: object) -> bool:
    return option is not None and option is not False


def _drop_of(embedder: Any) -> tuple[float, int]:
    """How often a `LabelEmbedding` replaces a label, and by what."""
    return (embedder.dropout_prob if embedder.training else 0), embedder.num_classes


def _places_of(block: nn.Module) -> Iterable[tuple[dict[str, Any], str, nn.Module]]:
    """Where each part and its parents hang: in which dictionary, under which name."""
    for path, module in block.named_modules():
        if path and any(f"{part}.".startswith(f"{path}.") for part in _PARTS):
            parent, _, name = path.rpartition(".")
            yield block.get_submodule(parent)._modules, name, module


def _is_plain(block: nn.Module) -> bool:
    """Whether calling the parts of `block` is the forward of a stock DiT's with their weights."""
    # A wrapper answers for the block that it holds, but does more when it is called.
    if type(block) is not LiTBlock or not is_unhooked(block):
        return False
    for name, kind in _PARTS.items():
        try:
            part = block.get_submodule(name)
        except AttributeError:
            return False
        if type(part) is not kind or not is_unhooked(part) or "token_drop" in part.__dict__:
            return False
        for parameter, sides in _PARAMETERS.get(kind, {}).items():
            x = part._parameters.get(parameter)
            if type(x) is not nn.Parameter:  # none, quantised, sharded
                return False
            if x.shape != tuple(getattr(part, side) for side in sides):
                return False
        if any(_is_set(getattr(part, extra, None)) for extra in _EXTRAS):
            return False
    return True


def _layers_of(blocks: nn.ModuleList) -> _Layers | None:
    """None where a block has other layers than a stock DiT's, or others than the next block."""
    if not all(map(_is_plain, blocks)):
        return None
    try:
        return _Layers(blocks)
    except (TypeError, ValueError):
        return None
