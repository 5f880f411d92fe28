"""Layers and guards that the CLEAR transformers share (Liu et al. 2024, arXiv:2412.16112)."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..attention.local import ClearAttnProcessor
from ..inheritance import student_config

# The arguments of a call that stand for a value of the configuration, in joint_attention_kwargs.
_PER_CALL = ("radius", "proportional_scale", "ntk_factor")


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_settings(radius: Any, proportional_scale: Any, ntk_factor: Any) -> None:
    """Checks what both a configuration and a call may set."""
    if not _is_number(radius):
        raise TypeError(f"`radius` must be a number, got {type(radius).__name__}")
    if not radius >= 1:  # also refuses nan
        raise ValueError(f"`radius` must be at least 1, got {radius}")
    if not isinstance(proportional_scale, bool):
        got = type(proportional_scale).__name__
        raise TypeError(f"`proportional_scale` must be a bool, got {got}")
    if not _is_number(ntk_factor):
        raise TypeError(f"`ntk_factor` must be a number, got {type(ntk_factor).__name__}")
    if not ntk_factor > 0:
        raise ValueError(f"`ntk_factor` must be positive, got {ntk_factor}")


def _check_down_factor(down_factor: Any) -> None:
    if down_factor is None:
        return
    if not _is_number(down_factor, Integral):
        got = type(down_factor).__name__
        raise TypeError(f"`down_factor` must be an integer or None, got {got}")
    if down_factor < 2:
        raise ValueError(f"`down_factor` must be at least 2, or None, got {down_factor}")


def _check_full_attention_layers(layers: Any, num_layers: int) -> None:
    if not isinstance(layers, Sequence):
        got = type(layers).__name__
        raise TypeError(f"`full_attention_layers` must be a sequence of numbers, got {got}")
    for layer in layers:
        if not (_is_number(layer, Integral) and 0 <= layer < num_layers):
            raise ValueError(
                f"`full_attention_layers` must be in 0 .. {num_layers - 1}, got {layer!r}"
            )


def check_spatial_shape(spatial_shape: Sequence[int], num_tokens: int) -> tuple[int, int]:
    """The sides ``(h, w)`` of a grid that holds exactly `num_tokens` image tokens."""
    sides = tuple(spatial_shape) if isinstance(spatial_shape, Sequence) else ()
    if len(sides) != 2 or not all(_is_number(side, Integral) and side > 0 for side in sides):
        raise ValueError(
            f"`spatial_shape` must be two positive sides (height, width), got {spatial_shape!r}"
        )
    if sides[0] * sides[1] != num_tokens:
        raise ValueError(
            f"`spatial_shape` must hold the {num_tokens} image tokens, got {sides[0]} x {sides[1]}"
        )
    return sides[0], sides[1]


class ClearMixin:
    """Local attention in the stock blocks of a diffusers transformer; mixed in before it.

    The state dict is the stock one; with pooled keys `<layer>.processor.spatial_weight` comes on
    top, and keeps its initial mean where a checkpoint lacks it.
    """

    config: Any

    # Attributes that hold blocks, in the order in which the tokens pass them.
    _block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    # Context parallelism gives attention a shard of the tokens, on which a grid means nothing.
    _cp_plan = None

    def _use_local_attention(self) -> None:
        """Gives every attention module its processor; the last step of a constructor."""
        config, layers = self.config, list(self._attention_layers())
        _check_settings(*(config[name] for name in _PER_CALL))
        _check_down_factor(config.down_factor)
        _check_full_attention_layers(config.full_attention_layers, layers[-1][0] + 1)
        for index, _, attention in layers:
            full = index in config.full_attention_layers
            attention.set_processor(ClearAttnProcessor(None if full else config.down_factor, full))

    def _attention_layers(self) -> Iterator[tuple[int, str, Any]]:
        """Number of the block, name and module of every attention layer."""
        index = 0
        for blocks in self._block_lists:
            for number, block in enumerate(getattr(self, blocks)):
                for name in ("attn", "attn2"):
                    if getattr(block, name, None) is not None:
                        yield index, f"{blocks}.{number}.{name}", getattr(block, name)
                index += 1

    def attention_layer_names(self) -> dict[str, bool]:
        """Names of the attention modules -> whether the configuration declares full attention."""
        full = self.config.full_attention_layers
        return {name: index in full for index, name, _ in self._attention_layers()}

    def _why_not_ours(self, name: str, processor: object) -> str | None:
        """The reason why a processor must not serve the layer `name`, None if it may."""
        if not isinstance(processor, ClearAttnProcessor):
            return f"a {type(processor).__name__}, which would bring full attention back"
        full = self.attention_layer_names()[name]
        down_factor = None if full else self.config.down_factor
        if (processor.full_attention, processor.down_factor) == (full, down_factor):
            return None
        return (
            f"one with full_attention={processor.full_attention},"
            f" down_factor={processor.down_factor} where the configuration says {full},"
            f" {down_factor}"
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Sets processors, one for all layers or a dict from `attn_processors`-like names.

        Raises:
            ValueError: another processor than `ClearAttnProcessor` (slicing, xformers,
                IP-Adapters), one that contradicts the configuration, or one with pooled keys for
                all layers, whose kernels differ. No layer has changed then.
        """
        names = list(self.attention_layer_names())
        given = processor if isinstance(processor, dict) else None
        if given is not None and set(given) != {f"{name}.processor" for name in names}:
            raise ValueError(
                "`processor` must have as keys the names in attn_processors, whose number of"
                f" processors is {len(names)}, got {len(given)}"
            )
        for name in names:
            each = processor if given is None else given[f"{name}.processor"]
            if reason := self._why_not_ours(name, each):
                raise ValueError(f"`processor` must be a ClearAttnProcessor, got {reason} ({name})")
        distinct = {id(processor)} if given is None else {id(value) for value in given.values()}
        if self.config.down_factor is not None and len(distinct) != len(names):
            raise ValueError(
                "`processor` must be one object a layer with pooled keys, which have a kernel each,"
                f" got {len(distinct)} for {len(names)} layers"
            )
        super().set_attn_processor(dict(given) if given is not None else processor)  # type: ignore[misc]

    def _check_processors(self) -> None:
        # Slicing, xformers and PAG put processors into the modules, past set_attn_processor.
        for _, name, attention in self._attention_layers():
            if not isinstance(attention.processor, ClearAttnProcessor):
                raise ValueError(
                    f"`{name}.processor` must be a ClearAttnProcessor, got a"
                    f" {type(attention.processor).__name__}, which attends fully; restore it with"
                    " set_processor"
                )

    def _call_arguments(
        self, joint_attention_kwargs: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The other entries, and the configuration with those that this call sets differently."""
        self._check_processors()
        others = dict(joint_attention_kwargs or {})
        settings = {name: others.pop(name, self.config[name]) for name in _PER_CALL}
        _check_settings(**settings)
        return others, settings

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "IP-Adapters replace the attention processors: they must not be loaded into a"
            f" {type(self).__name__}, which would attend fully again"
        )

    def enable_parallelism(self, *, config: Any, **kwargs: Any) -> None:
        """As in diffusers, without context parallelism, which shards the tokens of the grid."""
        name = type(config).__name__
        if "ContextParallel" in name or getattr(config, "context_parallel_config", None):
            raise NotImplementedError(
                f"`config` must not ask for context parallelism, got a {name}: local attention"
                " needs the tokens of the whole grid"
            )
        super().enable_parallelism(config=config, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers: FLUX or SD3 in one file; `radius` and the like may be given.

        Raises:
            NotImplementedError: a `down_factor`. diffusers takes a file without pooling kernels
                for one of the authors' layout then.
        """
        down_factor = kwargs.get("down_factor")
        if down_factor is not None:
            raise NotImplementedError(
                f"`down_factor` must be None for a single file, got {down_factor}: give the model"
                " that comes of it to from_teacher(model, down_factor=...), which copies nothing"
            )
        return super().from_single_file(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_teacher(cls, teacher: nn.Module, **overrides: Any) -> Self:
        """A local-attention model on the very weights of `teacher`: nothing is copied.

        What changes one of the two in place (an optimiser's step, fusing a LoRA) changes both;
        before training, replace the parameters that shall learn by clones.

        Args:
            teacher: the stock model, or a CLEAR model with another radius.
            overrides: configuration values, e.g. ``radius=8, down_factor=4``.

        Returns:
            The model in eval mode, sharing every tensor; `spatial_weight` is new, unless the
            teacher has it.

        Raises:
            ValueError: an unknown override, weights that are not those of the stock model (fused
                projections, adapters), not loaded, or of another shape.
        """
        config = student_config(cls, teacher, overrides)
        with torch.device("meta"):
            student = cls(**config)
        assert isinstance(student, nn.Module)
        mine = student.state_dict()
        theirs = {
            name: tensor
            for name, tensor in teacher.state_dict().items()
            if not _is_pooling(name) or (name in mine and tensor.shape == mine[name].shape)
        }
        problems = [f"the student has no {name}" for name in theirs if name not in mine]
        problems += [
            f"{name} is missing" for name in mine if name not in theirs and not _is_pooling(name)
        ]
        problems += [f"{name} is not loaded" for name, tensor in theirs.items() if tensor.is_meta]
        problems += [
            f"{name} is {tuple(tensor.shape)}, not {tuple(mine[name].shape)}"
            for name, tensor in theirs.items()
            if name in mine and tensor.shape != mine[name].shape
        ]
        if problems:
            raise ValueError(
                f"`teacher` must hold the weights of the stock model, got {len(problems)} that"
                f" differ: {'; '.join(problems[:3])}"
            )
        student.load_state_dict(theirs, strict=False, assign=True)
        for name, buffer in student.named_buffers():
            if buffer.is_meta:  # not in the state dict
                owner, _, attribute = name.rpartition(".")
                setattr(student.get_submodule(owner), attribute, teacher.get_buffer(name))
        student._create_missing_pooling(dtype=next(iter(theirs.values())).dtype)
        return student.eval()

    def _create_missing_pooling(self, dtype: torch.dtype | None) -> None:
        """Makes `spatial_weight` where a checkpoint without it has left it on the meta device."""
        for _, _, attention in self._attention_layers():
            weight: Tensor | None = attention.processor.spatial_weight
            if weight is not None and weight.is_meta:
                device = attention.to_k.weight.device
                attention.processor.to_empty(device="cpu" if device.type == "meta" else device)
                attention.processor.to(dtype or weight.dtype).reset_parameters()

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        # diffusers leaves what a checkpoint lacks without values.
        result = super()._load_pretrained_model(model, *args, **kwargs)  # type: ignore[misc]
        model._create_missing_pooling(kwargs.get("dtype"))
        return result


def _is_pooling(name: str) -> bool:
    return name.endswith(".processor.spatial_weight")
