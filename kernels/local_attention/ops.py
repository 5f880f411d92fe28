"""Local attention as PyTorch operators with their gradient: what compilers and autograd see.

Two pairs: tiles in plain PyTorch on every device, and the Triton kernels, which may go without
extra keys.
"""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient, reason_of_transforms, register
from .._common.plans import Memo
from .._common.precision import accumulation_dtype, no_autocast
from .reference import backward, forward, parts
from .tiles import Geometry

# Opaque operators, lest a compiler unroll the loops over tiles into its graph.
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor extra_key, Tensor extra_value"
_NUMBERS = "SymInt height, SymInt width, SymInt num_prefix, float radius, float scale"
_RESULTS = "Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse"
_FWD_SCHEMA = f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)"
_BWD_SCHEMA = f"({_TENSORS}, {_RESULTS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_FWD, _BWD = "lintra::local_attention_reference_fwd", "lintra::local_attention_reference_bwd"
torch.library.define(_FWD, _FWD_SCHEMA)
torch.library.define(_BWD, _BWD_SCHEMA)


def _empty_results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = value.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


def _empty_grads(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:5])


torch.library.register_fake(_FWD, _empty_results)
torch.library.register_fake(_BWD, _empty_grads)
_LAUNCHER = f"{__package__}.triton"
_KERNEL_FWD = register(
    "local_attention_fwd",
    _FWD_SCHEMA.replace("Tensor extra", "Tensor? extra"),
    f"{_LAUNCHER}_fwd:local_attention_fwd",
    _empty_results,
)
_KERNEL_BWD = register(
    "local_attention_bwd", _BWD_SCHEMA, f"{_LAUNCHER}_bwd:local_attention_bwd", _empty_grads
)


@torch.library.impl(_FWD, "CompositeExplicitAutograd")
def _forward_all(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (*place, scale) = arguments[:5], arguments[5:]
    geometry = Geometry(*place)
    out, lse = _empty_results(*inputs)
    with no_autocast(out.device.type):
        for part, (out_part, lse_part) in parts(geometry, inputs, [out, lse.unsqueeze(3)]):
            forward(geometry, scale, part, out_part, lse_part)
    return out, lse


@torch.library.impl(_BWD, "CompositeExplicitAutograd")
def _backward_all(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (out, lse, grad_out, grad_lse, *place, scale) = arguments[:5], arguments[5:]
    geometry = Geometry(*place)
    results = [out, lse.unsqueeze(3), grad_out, grad_lse.unsqueeze(3)]
    # Sums over tiles are in the accumulation dtype; a query belongs to one tile only.
    grads = [inputs[0].new_empty(inputs[0].shape)]
    grads += [x.new_zeros(x.shape, dtype=lse.dtype) for x in inputs[1:]]
    with no_autocast(out.device.type):
        for part, others in parts(geometry, inputs, results + grads):
            backward(geometry, scale, part, others[:4], others[4:])
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


class _LocalAttention(torch.autograd.Function):
    """Keeps inputs, output and lse only, and computes every tile again in the backward pass."""

    @staticmethod
    def forward(
        # Spelt out, since torch.compile counts the names to see that there is no ctx.
        query: Tensor,
        key: Tensor,
        value: Tensor,
        extra_key: Tensor,
        extra_value: Tensor,
        height: int,
        width: int,
        num_prefix: int,
        radius: float,
        scale: float,
        kernel: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value, extra_key, extra_value)
        fwd = _KERNEL_FWD if kernel else torch.ops.lintra.local_attention_reference_fwd
        return fwd(*tensors, height, width, num_prefix, radius, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.numbers, ctx.kernel = inputs[5:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple:
        bwd = _KERNEL_BWD if ctx.kernel else torch.ops.lintra.local_attention_reference_bwd
        arguments = (*ctx.saved_tensors, grad_out, grad_lse, *ctx.numbers)
        grads = first_derivative("local_attention", bwd, *arguments)
        return *grads, *(None for _ in ctx.numbers), None


def local_attention_op(
    query: Tensor, key: Tensor, value: Tensor,
    extra_key: Tensor | None, extra_value: Tensor | None,
    height: int, width: int, num_prefix: int, radius: float, scale: float,
    *, kernel: bool, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.local_attention`: the output and the log-sum-exp, by the Triton
    `kernel` or by tiles in PyTorch."""
    numbers = (height, width, num_prefix, radius, scale)
    plain = not needs_gradient(query, key, value, extra_key, extra_value)
    # The operator alone would lose tangents without a word.
    if kernel and plain and reason_of_transforms() is None:
        return _KERNEL_FWD(query, key, value, extra_key, extra_value, *numbers, memo=memo)
    if extra_key is None or extra_value is None:
        extra_key, extra_value = key[:, :0].detach(), value[:, :0].detach()
    return _LocalAttention.apply(query, key, value, extra_key, extra_value, *numbers, kernel)
