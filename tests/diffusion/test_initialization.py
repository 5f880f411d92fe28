"""How transformers that are trained from scratch begin."""

import pytest
import torch

from lintra.diffusion.initialization import initialize_mmdit
from tiny_clear import CLEAR, STOCK, clear_inputs


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("kind", ["stock", "clear"])
def test_blocks_begin_as_the_identity_and_the_output_at_zero(family: str, kind: str) -> None:
    cls, config = STOCK[family]
    torch.manual_seed(0)
    extra = {} if kind == "stock" else {"radius": 2, "down_factor": 3}
    model = (cls if kind == "stock" else CLEAR[family])(**config, **extra)
    initialize_mmdit(model)
    seen = []
    for block in model.transformer_blocks[:2]:
        block.register_forward_pre_hook(
            lambda module, _, inputs: seen.append(inputs["hidden_states"].detach()),
            with_kwargs=True,
        )
    output = model(**clear_inputs(family), return_dict=False)[0]
    assert not output.any()
    first, second = seen
    assert first.abs().mean() > 0.1
    assert torch.equal(first, second)
    output = model.proj_out.weight
    output.data.normal_()
    model(**clear_inputs(family), return_dict=False)[0].square().sum().backward()
    assert model.transformer_blocks[0].norm1.linear.weight.grad.isfinite().all()
