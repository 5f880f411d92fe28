"""The discrete Gaussian process of DDPM with learned variance (Ho et al. 2020; Nichol et al. 2021).

diffusers' schedulers sample from it; training with a learned variance needs its posterior too.
"""

import math
from typing import Self

import torch
from torch import Tensor


class DDPMProcess:
    """Tables of the forward process and of its posterior, by step t of T.

    With abar_t = prod_{s <= t} (1 - beta_s):

    - ``q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)``
    - ``q(x_{t-1} | x_t, x_0) = N(c1_t x_0 + c2_t x_t, var_t)`` with
      ``var_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)`` (Ho et al. 2020, arXiv:2006.11239, Eq. 6-7)

    Args:
        alphas_cumprod: abar, ``(T,)``, decreasing in (0, 1), or a respaced subset. In float64: in
            a scheduler's float32 the first steps' 1 - abar is .06 % off.

    All tables are computed in float64 and read as float32.
    """

    def __init__(self, alphas_cumprod: Tensor):
        if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
            raise ValueError(
                f"`alphas_cumprod` must have shape (T,), T > 1, got {tuple(alphas_cumprod.shape)}"
            )
        abar = alphas_cumprod.to("cpu", torch.float64)
        abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / abar_before
        variance = beta * (1 - abar_before) / (1 - abar)
        self.num_steps = len(abar)
        tables = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "mean_x0": beta * abar_before.sqrt() / (1 - abar),
            "mean_xt": (1 - beta).sqrt() * (1 - abar_before) / (1 - abar),
            "log_beta": beta.log(),
            # The posterior variance at t = 0 is 0: its logarithm is replaced by that of t = 1.
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
        }
        self._tables = {name: values.float() for name, values in tables.items()}

    def to(self, device: torch.device) -> Self:
        """Moves the tables to `device`, in place: that of the timesteps they are read at."""
        self._tables = {name: values.to(device) for name, values in self._tables.items()}
        return self

    def table(self, name: str, timestep: Tensor) -> Tensor:
        """Entries `timestep` (B,) of a table, as float32 (B, 1, 1, 1)."""
        return self._tables[name][timestep].view(-1, 1, 1, 1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform steps ``(count,)`` int64, on the generator's device."""
        device = generator.device
        return torch.randint(self.num_steps, (count,), generator=generator, device=device)

    def weighting(self, timestep: Tensor) -> Tensor | None:
        """None: every step counts alike."""
        return None

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of x_0 = `clean` and unit normal `noise`, all (B, C, H, W)."""
        return (
            self.table("sqrt_abar", timestep) * clean
            + self.table("sqrt_one_minus_abar", timestep) * noise
        )

    def predict_clean(self, noised: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The x_0 that x_t = `noised` and its noise imply; not clipped."""
        return (noised - self.table("sqrt_one_minus_abar", timestep) * noise) / self.table(
            "sqrt_abar", timestep
        )

    def posterior_mean(self, clean: Tensor, noised: Tensor, timestep: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self.table("mean_x0", timestep) * clean + self.table("mean_xt", timestep) * noised

    def learned_log_variance(self, raw: Tensor, timestep: Tensor) -> Tensor:
        """``f log beta_t + (1 - f) log var_t`` with f = (raw + 1) / 2, raw not clamped.

        Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 15.
        """
        fraction = (raw + 1) / 2
        return fraction * self.table("log_beta", timestep) + (1 - fraction) * self.table(
            "log_variance", timestep
        )

    def variational_bound(
        self,
        clean: Tensor,
        noised: Tensor,
        timestep: Tensor,
        noise: Tensor,
        raw_variance: Tensor,
    ) -> Tensor:
        """Term t of the variational bound in bits per dimension, ``(B,)``.

        ``KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`` for t > 0, and at t = 0 the negative
        log-likelihood of `clean` (8-bit values scaled to [-1, 1]) under the discretised Gaussian.

        Args:
            clean, noised: x_0 and x_t, ``(B, C, H, W)``.
            timestep: ``(B,)`` int64.
            noise: predicted noise; detach it to train only the variance by this term, as the
                hybrid objective of Nichol and Dhariwal does.
            raw_variance: variance channels of the model.
        """
        mean = self.posterior_mean(self.predict_clean(noised, noise, timestep), noised, timestep)
        log_variance = self.learned_log_variance(raw_variance, timestep)
        divergence = _gaussian_kl(
            self.posterior_mean(clean, noised, timestep),
            self.table("log_variance", timestep),
            mean,
            log_variance,
        )
        likelihood = _discretized_log_likelihood(clean, mean, 0.5 * log_variance)
        nats = torch.where(timestep.view(-1, 1, 1, 1) == 0, -likelihood, divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def _gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_var1)) || N(mean2, exp(log_var2))), elementwise, in nats."""
    return 0.5 * (
        log_var2
        - log_var1
        + torch.exp(log_var1 - log_var2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_var2)
        - 1
    )


def _normal_cdf(x: Tensor) -> Tensor:
    """Page's tanh approximation, which the published models were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the 8-bit bin around x in [-1, 1]; the edge bins reach to infinity.

    Ho et al. 2020, Eq. 13.
    """
    centred, inverse_scale, half_bin = x - mean, torch.exp(-log_scale), 1 / 255
    upper = _normal_cdf(inverse_scale * (centred + half_bin))
    lower = _normal_cdf(inverse_scale * (centred - half_bin))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
