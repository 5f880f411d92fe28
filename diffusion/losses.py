"""Loss terms of training and distillation, by the names that recipes use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .ddpm import DDPMProcess
from .flow import FlowProcess


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One noised batch and what student and teacher made of it; the arguments of every term.

    Attributes:
        process: the noising process.
        clean, noise, noised: x_0, the noise and x_t, ``(B, C, H, W)`` float32.
        timestep: ``(B,)``; int64 steps of DDPM, or levels of a flow in (0, 1].
        student: output of the student, ``(B, C, H, W)``, or ``(B, 2 C, H, W)`` with the raw
            variance in the last C channels.
        teacher: output of the teacher for the same input and condition, without gradient.
        weighting: factor of each sample's velocity and attention terms, ``(B,)``; None is 1.
        attention: outputs of the compared attention layers, student's and teacher's,
            ``(B, N, C)`` each.
    """

    process: DDPMProcess | FlowProcess
    clean: Tensor
    noise: Tensor
    noised: Tensor
    timestep: Tensor
    student: Tensor
    teacher: Tensor | None = None
    weighting: Tensor | None = None
    attention: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(frozen=True)
class LossTerm:
    """A term: `function` maps predictions to one value per sample, ``(B,)`` float32.

    Attributes:
        process: what the model predicts: noise (`ddpm`), velocity (`flow`), or None for either.
        needs_teacher: the term compares with a teacher.
        needs_variance: the student must predict a variance.
        attention: the term compares outputs of attention layers.
        forced: the teacher's outputs replace the student's, layer by layer: each layer learns
            from the teacher's inputs, and nothing else of the student counts.
    """

    function: Callable[[Predictions], Tensor]
    process: Literal["ddpm", "flow"] | None
    needs_teacher: bool = False
    needs_variance: bool = False
    attention: bool = False
    forced: bool = False


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
    assert isinstance(p.process, DDPMProcess)
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


def _weighted(p: Predictions, error: Tensor) -> Tensor:
    return error if p.weighting is None else p.weighting * error


def _velocity_error(p: Predictions, target: Tensor) -> Tensor:
    return _weighted(p, _mean_square(p.student.float(), target))


def flow_loss(p: Predictions) -> Tensor:
    """``w(s) mean (v_student - (e - x_0))^2``: conditional flow matching (arXiv:2403.03206)."""
    return _velocity_error(p, p.noise - p.clean)


def output_distillation(p: Predictions) -> Tensor:
    """``w(s) mean (v_student - v_teacher)^2`` (CLEAR, arXiv:2412.16112, its prediction loss)."""
    assert p.teacher is not None
    return _velocity_error(p, p.teacher.float())


def attention_distillation(p: Predictions) -> Tensor:
    """``w(s) sum over layers of mean (A_student - A_teacher)^2`` (CLEAR, its attention loss).

    A is the output of an attention layer, text and image; in FLUX's single blocks that is what the
    heads give, concatenated, before the block's `proj_out`.
    """
    pairs = (_mean_square(student.float(), teacher.float()) for student, teacher in p.attention)
    return _weighted(p, sum(pairs, p.noise.new_zeros(len(p.noise))))


LOSS_TERMS: dict[str, LossTerm] = {
    "noise": LossTerm(noise_loss, "ddpm"),
    "vlb": LossTerm(vlb_loss, "ddpm", needs_variance=True),
    "noise_distillation": LossTerm(noise_distillation, "ddpm", needs_teacher=True),
    "variance_distillation": LossTerm(
        variance_distillation, "ddpm", needs_teacher=True, needs_variance=True
    ),
    "flow": LossTerm(flow_loss, "flow"),
    "output_distillation": LossTerm(output_distillation, "flow", needs_teacher=True),
    "attention_distillation": LossTerm(
        attention_distillation, None, needs_teacher=True, attention=True
    ),
    "attention_transfer": LossTerm(
        attention_distillation, None, needs_teacher=True, attention=True, forced=True
    ),
}


def check_loss_weights(
    weights: Mapping[str, float],
    *,
    has_teacher: bool,
    has_variance: bool,
    process: Literal["ddpm", "flow"] = "ddpm",
    has_attention: bool = True,
) -> None:
    """Raises ValueError for unknown names, negative weights, and terms that lack their input.

    Args:
        weights: weight of each term by name.
        has_teacher: there is a teacher.
        has_variance: the model predicts a variance.
        process: what the model predicts.
        has_attention: attention outputs of student and teacher can be compared.
    """
    for name, weight in weights.items():
        if name not in LOSS_TERMS:
            raise ValueError(f"`loss` must name terms of {', '.join(LOSS_TERMS)}, got {name!r}")
        term = LOSS_TERMS[name]
        if weight < 0:
            raise ValueError(f"`loss.{name}` must not be negative, got {weight}")
        if weight and term.process not in (None, process):
            raise ValueError(f"`loss.{name}` must be 0 for a model of {process}, got {weight}")
        if weight and term.needs_teacher and not has_teacher:
            raise ValueError(f"`loss.{name}` must be 0 without a teacher, got {weight}")
        if weight and term.needs_variance and not has_variance:
            raise ValueError(
                f"`loss.{name}` must be 0 for models without variance channels, got {weight}"
            )
        if weight and term.attention and not has_attention:
            raise ValueError(f"`loss.{name}` must be 0 for models other than CLEAR's, got {weight}")
    weighted = [name for name, weight in weights.items() if weight]
    if not weighted:
        raise ValueError(f"`loss` must give some term a weight, got {dict(weights)}")
    forced = [name for name in weighted if LOSS_TERMS[name].forced]
    if forced and len(weighted) > 1:
        others = ", ".join(name for name in weighted if name not in forced)
        raise ValueError(
            f"`loss.{forced[0]}` must be the only term, because it replaces what the student's"
            f" attention gives, got also {others}"
        )


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


def compares_attention(weights: Mapping[str, float]) -> bool:
    """True if some weighted term compares outputs of attention layers."""
    return any(weight and LOSS_TERMS[name].attention for name, weight in weights.items())


def forces_attention(weights: Mapping[str, float]) -> bool:
    """True if the weighted term wants the teacher's outputs in the place of the student's."""
    return any(weight and LOSS_TERMS[name].forced for name, weight in weights.items())
