"""The rectified flow that FLUX and SD3 are trained on (Liu et al. 2022; Esser et al. 2024)."""

from typing import Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


class FlowProcess:
    """``x_t = (1 - s) x_0 + s e`` with noise e, and its velocity ``v = e - x_0``.

    The level s in (0, 1] is drawn on the grid ``1 / T, ..., 1``, shifted to
    ``shift s / (1 + (shift - 1) s)``, in the way of diffusers' training scripts for FLUX and SD3
    (arXiv:2403.03206, section 3.1).

    Args:
        num_train_timesteps: T.
        shift: 1 for FLUX (which shifts by resolution in sampling only), 3 for SD3.
        weighting_scheme: a member of `WEIGHTING_SCHEMES`. `logit_normal` and `mode` change how
            levels are drawn, `sigma_sqrt` and `cosmap` how losses are weighted; `none` is uniform
            in both.
        logit_mean, logit_std: of `logit_normal`.
        mode_scale: of `mode`.

    Raises:
        ValueError: an unknown scheme.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
    ):
        if weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(
                f"`weighting_scheme` must be one of {', '.join(WEIGHTING_SCHEMES)}, got"
                f" {weighting_scheme!r}"
            )
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift)
        self._sigmas = scheduler.sigmas.float()  # descending
        self._scheme = weighting_scheme
        self._density = {
            "logit_mean": logit_mean,
            "logit_std": logit_std,
            "mode_scale": mode_scale,
        }

    def to(self, device: torch.device) -> Self:
        """Nothing is kept on a device; as of `DDPMProcess`."""
        return self

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels ``(count,)`` float32, on the generator's device."""
        share = compute_density_for_timestep_sampling(
            self._scheme, count, **self._density, device=generator.device, generator=generator
        )
        last = len(self._sigmas) - 1
        return self._sigmas.to(share.device)[(share * len(self._sigmas)).long().clamp(0, last)]

    def add_noise(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of x_0 = `clean` and unit normal `noise`, all ``(B, C, H, W)``; `sigma` ``(B,)``."""
        sigma = sigma.view(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise

    def weighting(self, sigma: Tensor) -> Tensor:
        """The factor of every sample's losses, ``(B,)`` float32."""
        return compute_loss_weighting_for_sd3(self._scheme, sigma).float()
