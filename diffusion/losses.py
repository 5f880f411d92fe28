"""Loss terms of training and distillation, by the names that recipes use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .ddpm import DDPMProcess


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One noised batch and what student and teacher made of it; the arguments of every term.

    Attributes:
        process: the noising process.
        clean, noise, noised: x_0, the noise and x_t, ``(B, C, H, W)`` float32.
        timestep: ``(B,)`` int64.
        student: output of the student, ``(B, C, H, W)``, or ``(B, 2 C, H, W)`` with the raw
            variance in the last C channels.
        teacher: output of the teacher for the same input and condition, without gradient.
    """

    process: DDPMProcess
    clean: Tensor
    noise: Tensor
    noised: Tensor
    timestep: Tensor
    student: Tensor
    teacher: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """A term: `function` maps predictions to one value per sample, ``(B,)`` float32."""

    function: Callable[[Predictions], Tensor]
    needs_teacher: bool = False
    needs_variance: bool = False


def _split(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Noise and variance channels in float32: a loss must not round what it compares."""
    return output[:, :channels].float(), output[:, channels:].float()


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def noise_loss(p: Predictions) -> Tensor:
    """``mean (eps - eps_student)^2``: L_simple of Ho et al. 2020 (arXiv:2006.11239), Eq. 14."""
    student, _ = _split(p.student, p.noise.shape[1])
    return _mean_square(p.noise, student)


def vlb_loss(p: Predictions) -> Tensor:
    """Term t of the variational bound in bits per dimension, with the predicted noise detached.

    L_vlb of Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.1, as DiT is trained.
    """
    noise, variance = _split(p.student, p.noise.shape[1])
    return p.process.variational_bound(p.clean, p.noised, p.timestep, noise.detach(), variance)


def noise_distillation(p: Predictions) -> Tensor:
    """``mean (eps_teacher - eps_student)^2`` (LiT, arXiv:2501.12976, hybrid distillation)."""
    assert p.teacher is not None
    channels = p.noise.shape[1]
    return _mean_square(_split(p.teacher, channels)[0], _split(p.student, channels)[0])


def variance_distillation(p: Predictions) -> Tensor:
    """``mean (v_teacher - v_student)^2`` of the raw variance channels (LiT, arXiv:2501.12976)."""
    assert p.teacher is not None
    channels = p.noise.shape[1]
    return _mean_square(_split(p.teacher, channels)[1], _split(p.student, channels)[1])


LOSS_TERMS: dict[str, LossTerm] = {
    "noise": LossTerm(noise_loss),
    "vlb": LossTerm(vlb_loss, needs_variance=True),
    "noise_distillation": LossTerm(noise_distillation, needs_teacher=True),
    "variance_distillation": LossTerm(
        variance_distillation, needs_teacher=True, needs_variance=True
    ),
}


def check_loss_weights(
    weights: Mapping[str, float], *, has_teacher: bool, has_variance: bool
) -> None:
    """Raises ValueError for unknown names, negative weights, and terms that lack their input."""
    for name, weight in weights.items():
        if name not in LOSS_TERMS:
            raise ValueError(f"`loss` must name terms of {', '.join(LOSS_TERMS)}, got {name!r}")
        if weight < 0:
            raise ValueError(f"`loss.{name}` must not be negative, got {weight}")
        if weight and LOSS_TERMS[name].needs_teacher and not has_teacher:
            raise ValueError(f"`loss.{name}` must be 0 without a teacher, got {weight}")
        if weight and LOSS_TERMS[name].needs_variance and not has_variance:
            raise ValueError(
                f"`loss.{name}` must be 0 for models without variance channels, got {weight}"
            )
    if not any(weights.values()):
        raise ValueError(f"`loss` must give some term a weight, got {dict(weights)}")


def weighted_loss(
    weights: Mapping[str, float], predictions: Predictions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of terms, each a mean over the batch, and the unweighted terms detached."""
    total = predictions.noised.new_zeros(())
    terms = {}
    for name, weight in weights.items():
        if weight:
            value = LOSS_TERMS[name].function(predictions).mean()
            total = total + weight * value
            terms[name] = value.detach()
    return total, terms


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """True if some weighted term compares with a teacher."""
    return any(weight and LOSS_TERMS[name].needs_teacher for name, weight in weights.items())
