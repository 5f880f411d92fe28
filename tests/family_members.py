"""The measured members of the linear family, each written with `linear_attention`.

What is not (yet) a row of the feature map and normaliser tables is the same operation on other
features: the feature map, key weight and outer norm are computed here, the state by the operation.
Formulas: the `formula` entry of each C_ case. All tensors are (B, N, H, D).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra.kernels import linear_attention, token_conv2d

Parameters = dict[str, Tensor]


def _ratio(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return linear_attention(q, k, v, feature_map="identity", eps=eps)


def relu_sla(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return linear_attention(q, k, v, eps=1e-6)


def relu_sana(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return linear_attention(q, k, v, eps=1e-15)


def relu_lit(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return _ratio(F.relu(q) + 1e-6, F.relu(k) + 1e-6, v, eps=1e-6 * k.shape[1])


def relu_lit_dwc(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    heads, tokens = v.shape[2], v.shape[1]
    grid = (5, 9) if tokens == 45 else (math.isqrt(tokens), math.isqrt(tokens))
    out = token_conv2d(
        v.flatten(2),
        p["dwc.weight"].squeeze(1).repeat(heads, 1, 1),
        p["dwc.bias"].repeat(heads),
        grid=grid,
        residual=relu_lit(q, k, v, p).flatten(2),
    )
    return out.unflatten(2, (heads, -1))


def inline(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return linear_attention(q, k, v, feature_map="identity", normalizer="covariance")


def inline_exp(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return inline(torch.exp(0.2 * q), torch.exp(0.2 * k), v, p)


def _flow(q: Tensor, k: Tensor, v: Tensor, extra: float) -> Tensor:
    q, k, e = torch.sigmoid(q), torch.sigmoid(k), 1e-6

    def dot(x: Tensor, total: Tensor) -> Tensor:
        return ((x + e) * (total + e)).sum(-1, keepdim=True) + extra

    incoming = 1 / dot(q, k.sum(1, keepdim=True))
    outgoing = 1 / dot(k, q.sum(1, keepdim=True))
    sink = dot(q, (k * outgoing).sum(1, keepdim=True))
    source = dot(k, (q * incoming).sum(1, keepdim=True)).clamp(-1, 1)
    weighted = source.softmax(1) * k.shape[1] * v
    out = linear_attention(q * incoming, k, weighted, feature_map="identity", normalizer="none")
    return torch.sigmoid(sink * q.shape[1] / k.shape[1]) * out


def flow(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return _flow(q, k, v, extra=0.0)


def flow_cv(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    return _flow(q, k, v, extra=1e-6)


def _focus(x: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    x = (F.relu(x) + 1e-6) / F.softplus(scale).view(x.shape[2:])
    cubed = x**3
    return x.norm(dim=dims, keepdim=True) * cubed / cubed.norm(dim=dims, keepdim=True)


def focused(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    q, k = (_focus(x, p["scale"], (2, 3)) for x in (q, k))
    return _ratio(q, k, v, eps=1e-6 * k.shape[1])


def focused_per_head(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    q, k = (_focus(x, p["scale"], (3,)) for x in (q, k))
    return _ratio(q, k, v, eps=1e-6 * k.shape[1])


def hedgehog(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    def phi(x: Tensor, layer: Tensor) -> Tensor:
        y = torch.einsum("bnhd,hdf->bnhf", x, layer)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)

    return _ratio(phi(q, p["map_q.layer"]), phi(k, p["map_k.layer"]), v, eps=1e-12)


def hedgehog_fla(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    def phi(x: Tensor, name: str) -> Tensor:
        y = 2 * F.linear(x, p[f"{name}.layer.weight"], p[f"{name}.layer.bias"])
        return torch.cat([y, -y], -1).softmax(-1)

    return _ratio(phi(q, "map_q"), phi(k, "map_k"), v, eps=0.0)


def _unnormalized(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    return linear_attention(q, k, v, feature_map=feature_map, normalizer="none")


def norm_rms(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    out = _unnormalized(q, k, v, "elu1").flatten(2)
    rms = out.pow(2).mean(-1, keepdim=True).sqrt()
    return (p["norm.scale"] * out / (rms + 1e-8)).unflatten(2, (v.shape[2], -1))


def norm_ln(q: Tensor, k: Tensor, v: Tensor, p: Parameters) -> Tensor:
    out = _unnormalized(F.gelu(q), F.gelu(k), v, "identity").flatten(2)
    out = F.layer_norm(out, out.shape[-1:], p["norm.weight"], p["norm.bias"])
    return out.unflatten(2, (v.shape[2], -1))


MEMBERS = {
    function.__name__: function
    for function in (
        relu_sla, relu_sana, relu_lit, relu_lit_dwc, inline, inline_exp, flow, flow_cv, focused,
        focused_per_head, hedgehog, hedgehog_fla, norm_rms, norm_ln,
    )
}  # fmt: skip
