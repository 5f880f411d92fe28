"""CLEAR against the outputs of the official code."""

import pytest
import torch

from golden.golden_fill_diffusion import digest, fill_all
from golden_cases import case_names, exact_exponential, load_case, noise_tensor
from lintra.diffusion import ClearFluxTransformer2DModel

__all__ = ["exact_exponential"]


@pytest.mark.usefixtures("exact_exponential")
@pytest.mark.parametrize("name", case_names("A_clear"))
def test_transformer(name):
    description, stored = load_case(name)
    call = description["call"]
    model = ClearFluxTransformer2DModel(
        **description["config"],
        radius=call["window_size"],
        down_factor=call["down_factor"],
        proportional_scale=call["proportional_attention"],
        ntk_factor=call["ntk_factor"],
    ).eval()
    weights = fill_all(description["weights"]["shapes"])
    assert digest(weights) == description["weights"]["sha256"]
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})

    traces = {}
    for kind in ("double", "single"):
        blocks = model.transformer_blocks if kind == "double" else model.single_transformer_blocks
        for number, block in enumerate(blocks):
            block.register_forward_hook(
                lambda _, __, out, key=f"trace.{kind}{number}.image": traces.update({key: out[1]})
            )
    tensors = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    inputs = {key: noise_tensor(description["inputs"][key]) for key in tensors}
    inputs |= {key: stored[key] for key in description["inputs"]["stored"]}
    with torch.no_grad():
        out = model(**inputs).sample
    atol = description["suggested_atol"]
    torch.testing.assert_close(out, stored["output"], atol=atol, rtol=0)
    torch.testing.assert_close(out.double(), stored["output_dense64"], atol=atol, rtol=0)
    expected = {key: value for key, value in stored.items() if key.startswith("trace.")}
    assert expected.keys() == ({} if not expected else traces).keys()
    for key, value in expected.items():
        torch.testing.assert_close(traces[key], value, atol=atol, rtol=1e-5)
