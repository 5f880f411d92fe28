"""Fill rule 1: every weight of a golden case from its key and shape alone.

Each tensor has its own generator, default_rng(crc32(key)), and draws
r = standard_normal(shape, float32); all arithmetic is float32.

*.weight, 2 or more dims     r * g / sqrt(prod(shape[1:])), g = GAIN of the owning module, else 1
*.weight, 1 dim              1 + 0.1 r        *.bias   0.02 r        *.alpha   0.3 + 0.1 r
running_mean, running_var    measured: stored in the case as stats/<key>, else 0 and 1
integer counters             INTS
relative_position_index, attn_mask   closed forms below
every other key              0.02 r
"""

import math
import zlib

import numpy as np
import torch

VERSION = 1
INTS = {"num_batches_tracked": 100, "warm": 0, "iter": 0, "total_step": 60000}
GAIN = {"proj": 0.25, "fc2": 0.25, "reduction": 0.25, "conv": 0.25, "residual.2": 1 / 3}


def draw(key, shape):
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(
        tuple(shape), dtype=np.float32
    )


def position_index(tokens):
    w = math.isqrt(tokens)
    y, x = np.divmod(np.arange(tokens), w)
    return (y[:, None] - y + w - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)


def shift_mask(windows, tokens):
    w, g = math.isqrt(tokens), math.isqrt(windows) * math.isqrt(tokens)
    band = np.searchsorted([g - w, g - w // 2], np.arange(g), side="right")
    ids = (
        (3 * band[:, None] + band)
        .reshape(g // w, w, g // w, w)
        .transpose(0, 2, 1, 3)
        .reshape(windows, tokens)
    )
    return np.where(ids[:, :, None] == ids[:, None], 0, -100).astype(np.float32)


def tensor(key, shape, stats=None):
    module, _, leaf = key.rpartition(".")
    if leaf in INTS:
        return np.full(shape, INTS[leaf], dtype=np.int64)
    if leaf in ("running_mean", "running_var"):
        return (
            np.full(shape, leaf == "running_var", np.float32)
            if stats is None
            else np.asarray(stats["stats/" + key])
        )
    if leaf in ("relative_position_index", "attn_mask"):
        return position_index(shape[0]) if leaf[0] == "r" else shift_mask(*shape[:2])
    r, f = draw(key, shape), np.float32
    if leaf == "weight" and len(shape) > 1:
        gain = next((g for name, g in GAIN.items() if ("." + module).endswith("." + name)), 1)
        return r * f(gain / math.sqrt(math.prod(shape[1:])))
    mean, std = {"weight": (1, 0.1), "alpha": (0.3, 0.1)}.get(leaf, (0, 0.02))
    return f(mean) + f(std) * r


def state_dict(
    layout, stats=None
):  # layout: [key, shape, dtype] rows of a case; stats: its .safetensors tensors
    return {key: torch.from_numpy(np.array(tensor(key, shape, stats))) for key, shape, *_ in layout}


def image(size, name="input", batch=2):
    return torch.from_numpy(draw(name, (batch, 3, size, size)))
