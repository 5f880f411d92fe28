"""Layer normalisation by PyTorch: runs on every device, differentiates, serves as the oracle."""

from torch import Tensor
from torch.nn import functional as F

from .._common.precision import accumulation_dtype, no_autocast


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The operation of `api.layer_norm`."""
    shape = (x.shape[-1],)
    with no_autocast(x.device.type):
        if x.dtype == weight.dtype == bias.dtype:
            return F.layer_norm(x, shape, weight, bias, eps)  # float32 inside
        dtype = accumulation_dtype(x.dtype)
        return F.layer_norm(x.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
