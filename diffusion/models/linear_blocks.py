"""What every transformer with LiT's attention shares, whatever diffusers class it derives from."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..attention.linear import LiTAttention, ValueConv2d
from ..inheritance import inherit_weights, student_config

# Head channels the default number of heads aims at: LiT-S/B/L/XL have 192, 256, 256, 288.
_HEAD_CHANNELS = 256


def default_num_linear_heads(width: int) -> int:
    """The divisor of `width` with heads nearest to 256 channels: 2, 3, 4, 4 for S, B, L, XL."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: abs(math.log(width / heads / _HEAD_CHANNELS)))


def install_linear_attention(
    blocks: Iterable[nn.Module],
    width: int,
    num_heads: int | None,
    **options: Any,
) -> None:
    """Puts a `LiTAttention` in the place of each block's self-attention; `attn2` stays.

    Args:
        blocks: transformer blocks with an `attn1`, changed in place.
        width: channels of the tokens.
        num_heads: heads of the linear attention; None takes `default_num_linear_heads`.
        options: further arguments of `LiTAttention`.
    """
    heads = default_num_linear_heads(width) if num_heads is None else num_heads
    for block in blocks:
        block.attn1 = LiTAttention(width, heads, **options)


def token_grid(hidden_states: Tensor, patch_size: int) -> tuple[int, int]:
    """Height and width in tokens of latents (B, C, height, width).

    Raises:
        ValueError: the patch size does not divide them.
    """
    height, width = hidden_states.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"`hidden_states` must have a height and width that the patch size {patch_size}"
            f" divides, got {height} x {width}"
        )
    return height // patch_size, width // patch_size


class LinearTransformerMixin(PeftAdapterMixin):
    """LoRA, `from_teacher`, and what diffusers must know of a model of linear blocks."""

    # Context parallelism hands attention a shard of the tokens: its state would be wrong, silently.
    _cp_plan = None
    # What `from_teacher` inherits unless told otherwise.
    default_policy: ClassVar[str] = "all_but_attention"

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        # diffusers leaves what a checkpoint lacks without values: the convolutions of a stock one.
        result = super()._load_pretrained_model(model, *args, **kwargs)
        missing, dtype = set(result[1]), kwargs.get("dtype")
        for name, module in model.named_modules():
            if isinstance(module, ValueConv2d) and f"{name}.weight" in missing:
                device = model.get_submodule(name.rpartition(".")[0]).to_v.weight.device
                module.to_empty(device="cpu" if device.type == "meta" else device)
                module.to(dtype or module.weight.dtype).reset_parameters()
        return result

    @classmethod
    def from_teacher(cls, teacher: ModelMixin, policy: str | None = None, **overrides: Any) -> Self:
        """A student of the teacher's configuration that has inherited its weights.

        Args:
            teacher: the softmax model (or a linear one, e.g. of another number of heads).
            policy: what is inherited, see `lintra.diffusion.inherit_weights`; None takes the
                class's `default_policy`.
            overrides: configuration values in which the student differs, e.g. `num_linear_heads=2`.

        Returns:
            The student in eval mode, in the teacher's dtype and on its device.
        """
        student = cls(**student_config(cls, teacher, overrides))
        student.to(device=teacher.device, dtype=teacher.dtype)
        inherit_weights(student, teacher, policy or cls.default_policy)
        return student.eval()
