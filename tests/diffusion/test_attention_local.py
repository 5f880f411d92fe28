"""The processor of CLEAR by itself: in a stock model, its scale and its messages."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention

from lintra.diffusion.attention.local import ClearAttnProcessor, proportional_attention_scale
from tiny_clear import DenseOracle, clear_inputs, tiny_stock


def test_one_processor_serves_a_stock_model():
    inputs, kwargs = clear_inputs("flux", (6, 7)), {"spatial_shape": (6, 7), "radius": 4}
    stock = tiny_stock("flux")
    with DenseOracle("flux", (6, 7), 4), torch.no_grad():
        expected = stock(**inputs).sample
    stock.set_attn_processor(ClearAttnProcessor())
    with torch.no_grad():
        out = stock(**inputs, joint_attention_kwargs=kwargs).sample
    torch.testing.assert_close(out, expected)


def test_proportional_scale_is_its_definition():
    assert proportional_attention_scale(4608, 128) == pytest.approx(128**-0.5, rel=1e-12)
    n = 512 + 256 * 256
    expected = math.sqrt(math.log(n) / math.log(4608) / 64)
    assert proportional_attention_scale(n, 64) == pytest.approx(expected, rel=1e-12)
    assert proportional_attention_scale(n, 64, pooled=True) == pytest.approx(
        math.sqrt(math.log(10 * n) / math.log(4608) / 64), rel=1e-12
    )


def test_pooling_starts_as_a_mean():
    processor = ClearAttnProcessor(down_factor=2)
    assert processor.spatial_weight.shape == (1, 1, 1, 2, 1, 2, 1)
    tokens = torch.randn(2, 24, 3, 5)
    mean = tokens.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(processor.forward(tokens, (4, 6)), mean)


def test_names_and_devices():
    processor = ClearAttnProcessor(down_factor=4, device="meta", dtype=torch.bfloat16)
    assert list(processor.state_dict()) == ["spatial_weight"]
    assert processor.spatial_weight.is_meta
    assert processor.spatial_weight.dtype == torch.bfloat16
    assert "down_factor=4, full_attention=False" in repr(processor)


def test_errors():
    attention = FluxAttention(8, heads=1, dim_head=8, pre_only=True, bias=True)
    attention.set_processor(ClearAttnProcessor())
    x = torch.zeros(1, 12, 8)
    with pytest.raises(ValueError, match=r"`spatial_shape` must be \(h, w\) in joint.*, got None"):
        attention(x, radius=2)
    with pytest.raises(ValueError, match=r"`radius` must be a number in joint.*, got None"):
        attention(x, spatial_shape=(3, 4))
    with pytest.raises(ValueError, match=r"`spatial_shape` must fit into the 12 tokens, got 4 x 4"):
        attention(x, spatial_shape=(4, 4), radius=2)
    with pytest.raises(ValueError, match="`attention_mask` must be None"):
        attention(x, attention_mask=torch.ones(12, 12), spatial_shape=(3, 4), radius=2)
    with pytest.raises(ValueError, match="`radius` must be at least 1, got 0"):
        attention(x, spatial_shape=(3, 4), radius=0)
    attention.set_processor(ClearAttnProcessor(down_factor=2))
    with pytest.raises(ValueError, match="down factor 2 divides, got 3 x 4"):
        attention(x, spatial_shape=(3, 4), radius=2)
