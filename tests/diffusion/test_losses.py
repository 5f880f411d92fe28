"""The DDPM process and the loss terms against the official numbers and their own contract."""

import pytest
import torch

from golden_cases import case_names, load_case
from lintra.diffusion.ddpm import DDPMProcess
from lintra.diffusion.losses import (
    LOSS_TERMS,
    Predictions,
    check_loss_weights,
    needs_teacher,
    weighted_loss,
)


def linear_process(steps=1000):
    betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
    return DDPMProcess((1 - betas).cumprod(0))


def process_of(name):
    if "respaced250" in name:
        return DDPMProcess(load_case("E_ddpm_schedule")[1]["respaced_250.alphas_cumprod"])
    return linear_process()


def predictions_of(name, stored):
    output = stored["model_output"].clone().requires_grad_()
    clean, noise, t = stored["x_start"], stored["noise"], stored["t"]
    process = process_of(name)
    noised = process.add_noise(clean, noise, t)
    torch.testing.assert_close(noised, stored["x_t"], rtol=1e-5, atol=1e-6)
    return output, Predictions(
        process=process, clean=clean, noise=noise, noised=stored["x_t"], timestep=t, student=output
    )


@pytest.mark.parametrize("name", [n for n in case_names("E_ddpm_loss") if "rescaled_kl" not in n])
def test_golden_loss(name):
    _, stored = load_case(name)
    output, predictions = predictions_of(name, stored)
    mse = LOSS_TERMS["noise"].function(predictions)
    torch.testing.assert_close(mse, stored["term.mse"], rtol=1e-4, atol=1e-7)
    loss = mse
    if "term.vb" in stored:
        # Respaced with rescaling: the official term carries the factor 250 / 1000.
        factor = 0.25 if "rescaled" in name else 1.0
        vlb = factor * LOSS_TERMS["vlb"].function(predictions)
        torch.testing.assert_close(vlb, stored["term.vb"], rtol=1e-4, atol=1e-7)
        loss = loss + vlb
    torch.testing.assert_close(loss, stored["term.loss"], rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    expected = stored["dmodel_output"]
    torch.testing.assert_close(
        gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
    )


def test_golden_bound_without_detaching():
    _, stored = load_case("E_ddpm_loss_rescaled_kl")
    output, p = predictions_of("E_ddpm_loss_rescaled_kl", stored)
    noise, variance = output.chunk(2, dim=1)
    loss = 1000 * p.process.variational_bound(p.clean, p.noised, p.timestep, noise, variance)
    torch.testing.assert_close(loss, stored["term.loss"], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    expected = stored["dmodel_output"]
    torch.testing.assert_close(
        gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
    )


def test_golden_parts():
    _, stored = load_case("E_ddpm_loss_T1000")
    _, p = predictions_of("E_ddpm_loss_T1000", stored)
    noise, variance = p.student.chunk(2, dim=1)
    clean = p.process.predict_clean(p.noised, noise, p.timestep)
    mean = p.process.posterior_mean(clean, p.noised, p.timestep)
    results = {
        "part.pred_xstart": clean,
        "part.model_mean": mean,
        "part.true_mean": p.process.posterior_mean(p.clean, p.noised, p.timestep),
        "part.model_log_variance": p.process.learned_log_variance(variance, p.timestep),
    }
    for key, value in results.items():
        scale = stored[key].abs().max().item()
        torch.testing.assert_close(value, stored[key], rtol=3e-4, atol=2e-5 * max(1, scale))


def test_golden_schedule():
    _, stored = load_case("E_ddpm_schedule")
    process = linear_process()
    t = torch.arange(1000)
    expected = {
        "mean_x0": stored["linear1000.posterior_mean_coef1"],
        "mean_xt": stored["linear1000.posterior_mean_coef2"],
        "log_variance": stored["linear1000.posterior_log_variance_clipped"],
        "log_beta": stored["linear1000.betas"].log(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(process.table(name, t).flatten(), value.float())


def random_predictions(teacher=True):
    generator = torch.Generator().manual_seed(0)
    shape, process, t = (3, 2, 4, 4), linear_process(), torch.tensor([0, 10, 999])
    clean, noise, *outputs = (torch.randn(shape, generator=generator) for _ in range(6))
    return Predictions(
        process=process,
        clean=clean,
        noise=noise,
        noised=process.add_noise(clean, noise, t),
        timestep=t,
        student=torch.cat(outputs[:2], 1).requires_grad_(),
        teacher=torch.cat(outputs[2:], 1) if teacher else None,
    )


def test_distillation_terms_are_their_definition():
    p = random_predictions()
    square = (p.teacher - p.student).square()
    noise = LOSS_TERMS["noise_distillation"].function(p)
    torch.testing.assert_close(noise, square[:, :2].mean((1, 2, 3)))
    variance = LOSS_TERMS["variance_distillation"].function(p)
    torch.testing.assert_close(variance, square[:, 2:].mean((1, 2, 3)))


def test_hybrid_loss_of_lit():
    p = random_predictions()
    weights = {"noise": 1.0, "vlb": 1.0, "noise_distillation": 0.5, "variance_distillation": 0.05}
    total, terms = weighted_loss(weights, p)
    assert set(terms) == set(weights)
    torch.testing.assert_close(total, sum(weights[name] * terms[name] for name in weights))
    total.backward()
    assert p.student.grad.isfinite().all()
    assert needs_teacher(weights)
    assert not needs_teacher({**weights, "noise_distillation": 0.0, "variance_distillation": 0.0})
    assert set(weighted_loss({"noise": 1.0, "vlb": 0.0}, p)[1]) == {"noise"}


def test_vlb_trains_only_the_variance():
    p = random_predictions(teacher=False)
    LOSS_TERMS["vlb"].function(p).sum().backward()
    assert not p.student.grad[:, :2].any()
    assert p.student.grad[:, 2:].any()


def test_half_outputs_are_compared_in_float32():
    p = random_predictions()
    half = Predictions(**{**vars(p), "student": p.student.detach().half()})
    terms = [term for term in LOSS_TERMS.values() if term.process == "ddpm"]
    assert all(term.function(half).dtype == torch.float32 for term in terms)


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ({"noize": 1.0}, {}, "`loss` must name terms of noise, vlb, .* got 'noize'"),
        ({"noise": -1.0}, {}, "`loss.noise` must not be negative, got -1.0"),
        ({"noise_distillation": 1.0}, {"has_teacher": False}, "must be 0 without a teacher"),
        ({"vlb": 1.0}, {"has_variance": False}, "`loss.vlb` must be 0 for models without variance"),
        ({"noise": 0.0}, {}, "`loss` must give some term a weight"),
    ],
)
def test_errors(weights, inputs, message):
    with pytest.raises(ValueError, match=message):
        check_loss_weights(weights, **{"has_teacher": True, "has_variance": True, **inputs})


def test_process_error():
    with pytest.raises(ValueError, match="`alphas_cumprod` must have shape"):
        DDPMProcess(torch.ones(1))
