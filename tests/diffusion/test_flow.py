"""The flow process and its losses: CLEAR's formulas, and diffusers' ways of drawing levels."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from golden.golden_fill_diffusion import fill_all
from golden_cases import exact_exponential, load_case, noise_tensor
from lintra.diffusion import ClearFluxTransformer2DModel
from lintra.diffusion.flow import WEIGHTING_SCHEMES, FlowProcess
from lintra.diffusion.losses import LOSS_TERMS, Predictions, check_loss_weights, weighted_loss
from lintra.diffusion.training.families import FluxFamily, attention_layer_names
from tiny_clear import FLUX, tiny_clear

__all__ = ["exact_exponential"]
CLEAR_LOSS = {"flow": 1.0, "output_distillation": 0.5, "attention_distillation": 0.05}


def generator():
    return torch.Generator().manual_seed(0)


def test_noising_and_velocity():
    process = FlowProcess()
    clean, noise = torch.randn(2, 3, 1, 4, 4)
    levels = torch.tensor([0.25, 0.5, 1.0])
    noised = process.add_noise(clean, noise, levels)
    torch.testing.assert_close(noised[0], 0.75 * clean[0] + 0.25 * noise[0])
    assert torch.equal(noised[2], noise[2])
    # The velocity is the derivative by the level.
    step = process.add_noise(clean, noise, levels + 0.01) - noised
    torch.testing.assert_close(step / 0.01, noise - clean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_levels_are_those_of_the_diffusers_scripts(scheme, shift):
    process = FlowProcess(1000, shift, scheme, logit_mean=0.5, logit_std=0.8, mode_scale=1.1)
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift)
    share = compute_density_for_timestep_sampling(
        scheme, 500, logit_mean=0.5, logit_std=0.8, mode_scale=1.1, generator=generator()
    )
    levels = scheduler.timesteps[(share * 1000).long()] / 1000
    found = process.draw(500, generator())
    torch.testing.assert_close(found, levels)
    assert 0 < found.min() < found.max() <= 1
    expected = compute_loss_weighting_for_sd3(scheme, levels)
    torch.testing.assert_close(process.weighting(found), expected)


def test_uniform_levels_lie_on_the_grid():
    levels = FlowProcess().draw(4000, generator())
    torch.testing.assert_close(1000 * levels, (1000 * levels).round(), atol=1e-3, rtol=0)
    assert abs(levels.mean() - 0.5) < 0.02


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match="`weighting_scheme` must be one of none, .* got 'cos'"):
        FlowProcess(weighting_scheme="cos")


def predictions(**changes):
    draw = torch.Generator().manual_seed(1)
    shape, process = (3, 2, 4, 4), FlowProcess()
    clean, noise, student, teacher = (torch.randn(shape, generator=draw) for _ in range(4))
    levels = torch.tensor([0.1, 0.5, 0.9])
    layers = [torch.randn(3, 5 + n, 7, generator=draw) for n in range(4)]
    values = {
        "process": process,
        "clean": clean,
        "noise": noise,
        "noised": process.add_noise(clean, noise, levels),
        "timestep": levels,
        "student": student.requires_grad_(),
        "teacher": teacher,
        "attention": ((layers[0], layers[0] + 1), (layers[1], layers[1] - 2)),
    }
    return Predictions(**{**values, **changes})


def test_the_loss_of_clear():
    """mse(v_S, e - x_0) + 0.5 mse(v_S, v_T) + 0.05 sum over layers of mse(A_S, A_T)."""
    p = predictions()
    total, terms = weighted_loss(CLEAR_LOSS, p)
    student = p.student.detach().double()
    flow = (student - (p.noise - p.clean)).square().mean()
    output = (student - p.teacher).square().mean()
    torch.testing.assert_close(terms["flow"].double(), flow)
    torch.testing.assert_close(terms["output_distillation"].double(), output)
    torch.testing.assert_close(terms["attention_distillation"], torch.tensor(1.0 + 4.0))
    torch.testing.assert_close(total.double(), flow + 0.5 * output + 0.05 * 5)
    total.backward()
    error = 2 * (student - (p.noise - p.clean)) + (student - p.teacher)
    torch.testing.assert_close(p.student.grad.double(), error / student.numel())


@pytest.mark.parametrize("name", [n for n, t in LOSS_TERMS.items() if t.process != "ddpm"])
def test_weighting_counts_for_every_term(name):
    weighting = torch.tensor([0.0, 1.0, 4.0])
    plain, weighted = predictions(), predictions(weighting=weighting)
    each = LOSS_TERMS[name].function(plain)
    torch.testing.assert_close(LOSS_TERMS[name].function(weighted), weighting * each)


def test_half_outputs_are_compared_in_float32():
    p = predictions()
    half = [(a.half(), b.half()) for a, b in p.attention]
    p = predictions(student=p.student.detach().half(), teacher=p.teacher.half(), attention=half)
    terms = [term for term in LOSS_TERMS.values() if term.process != "ddpm"]
    assert len(terms) == 4
    assert all(term.function(p).dtype == torch.float32 for term in terms)


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ({"noise": 1.0}, {}, "`loss.noise` must be 0 for a model of flow, got 1.0"),
        ({"flow": 1.0}, {"process": "ddpm"}, "`loss.flow` must be 0 for a model of ddpm, got 1.0"),
        ({"output_distillation": 1.0}, {"has_teacher": False}, "must be 0 without a teacher"),
        (
            {"attention_distillation": 1.0},
            {"has_attention": False},
            "must be 0 for models other than CLEAR's",
        ),
        (
            {"attention_transfer": 1.0, "flow": 1.0},
            {},
            "`loss.attention_transfer` must be the only term, .* got also flow",
        ),
    ],
)
def test_errors(weights, inputs, message):
    options = {"has_teacher": True, "has_variance": False, "process": "flow", **inputs}
    with pytest.raises(ValueError, match=message):
        check_loss_weights(weights, **options)


def test_layers_of_the_paper():
    with torch.device("meta"):
        model = ClearFluxTransformer2DModel(**{**FLUX, "num_layers": 19, "num_single_layers": 38})
    names = attention_layer_names(model, None)
    assert names == [f"single_transformer_blocks.{n}.attn" for n in range(1, 38, 4)]
    assert attention_layer_names(model, [0, 19]) == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
    ]
    assert len(attention_layer_names(model, None, default_all=True)) == 57
    with pytest.raises(ValueError, match="`model.attention_layers` must be in 0 .. 56, got 57"):
        attention_layer_names(model, [57])
    sd3 = tiny_clear("sd3", full_attention_layers=(2,))
    assert attention_layer_names(sd3, None) == ["transformer_blocks.1.attn"]
    assert attention_layer_names(sd3, None, default_all=True) == [
        "transformer_blocks.0.attn",
        "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn",
    ]


@pytest.mark.usefixtures("exact_exponential")
def test_the_family_calls_the_model_of_the_golden_case():
    """Packing, ids, guidance and levels of training give what the official code gave."""
    description, stored = load_case("A_clear_local_12x12_w4")
    model = ClearFluxTransformer2DModel(**description["config"], radius=4).eval()
    weights = fill_all(description["weights"]["shapes"])
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    packed = noise_tensor(description["inputs"]["hidden_states"])
    family = FluxFamily(model.config, float(stored["guidance"]))
    condition = {
        "prompt_embeds": noise_tensor(description["inputs"]["encoder_hidden_states"]),
        "pooled_prompt_embeds": noise_tensor(description["inputs"]["pooled_projections"]),
    }
    latents = FluxPipeline._unpack_latents(packed, 24, 24, 1)
    with torch.no_grad():
        out = family(model, latents, stored["timestep"], condition)
    out = FluxPipeline._pack_latents(out, 1, 4, 24, 24)
    torch.testing.assert_close(out, stored["output"], atol=2e-5, rtol=0)
