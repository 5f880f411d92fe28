"""The patch embedding by one matrix product against the convolution."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lintra.vision.models.patch_embedding import FoldablePatchEmbed, PatchConv2d
from vision_names import create_small


@pytest.mark.parametrize("size", [(32, 48), (35, 33)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_convolution(size, bias):
    conv = nn.Conv2d(3, 6, (16, 8), stride=(16, 8), bias=bias).double()
    patches = PatchConv2d.of(conv)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    for channels_first in (x, x.to(memory_format=torch.channels_last)):
        out, expected = patches(channels_first), conv(channels_first)
        torch.testing.assert_close(out, expected)
    leaves = [x, *conv.parameters()]
    grads, same = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    torch.testing.assert_close(grads, same)


def test_keeps_parameters_and_makes_contiguous_tokens():
    conv = nn.Conv2d(3, 6, 4, stride=4)
    patches = PatchConv2d.of(conv)
    assert PatchConv2d.of(patches) is patches
    assert patches.weight is conv.weight
    assert patches.bias is conv.bias
    assert patches(torch.randn(2, 3, 8, 12)).flatten(2).transpose(1, 2).is_contiguous()


def test_embedding_survives_another_patch_size():
    embed = FoldablePatchEmbed(img_size=32, patch_size=8, embed_dim=6)
    embed.set_input_size(img_size=(64, 64), patch_size=(16, 16))
    assert isinstance(embed.proj, PatchConv2d)
    x = torch.randn(1, 3, 64, 64)
    expected = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=16).flatten(2).mT
    torch.testing.assert_close(embed(x), expected)


@torch.no_grad()
def test_blocks_of_slab_get_contiguous_tokens():
    model = create_small("deit_tiny_slab_patch16_224").eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 3, 64, 64))
    assert seen[0].is_contiguous()
