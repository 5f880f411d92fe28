"""Aspect-ratio buckets: the tables, the nearest one, and images that fit into it."""

import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor

from lintra.diffusion.training.buckets import (
    PIXART_TABLES,
    fit_to_bucket,
    nearest_bucket,
    parse_buckets,
)


def test_choices():
    assert parse_buckets(None, 1024, 16) == [(1024, 1024)]
    assert parse_buckets("64,32; 32,32;32,64;", 0, 16) == [(32, 64), (32, 32), (64, 32)]
    for resolution, table in PIXART_TABLES.items():
        sizes = parse_buckets("pixart", resolution, 16)
        assert len(sizes) == len({tuple(size) for size in table.values()})
        assert (resolution, resolution) in sizes


@pytest.mark.parametrize("size", [(1, 4), (480, 640), (1000, 1003), (3000, 800)])
def test_nearest_is_what_a_pipeline_would_draw(size):
    buckets = parse_buckets("pixart", 512, 16)
    expected = PixArtImageProcessor.classify_height_width_bin(*size, ratios=PIXART_TABLES[512])
    assert buckets[nearest_bucket(size, buckets)] == expected


@pytest.mark.parametrize("size", [(20, 20), (7, 90), (48, 32), (100, 33)])
def test_images_fill_their_bucket(size):
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    fitted = fit_to_bucket(image, (48, 32))
    assert fitted.shape == (3, 48, 32)
    assert (fitted == 200).all()


def test_the_middle_is_kept():
    image = torch.zeros(1, 10, 40, dtype=torch.uint8)
    image[..., 15:25] = 255
    assert (fit_to_bucket(image, (10, 10)) == 255).all()


@pytest.mark.parametrize(
    ("choice", "resolution", "message"),
    [
        ("pixart", 768, "`resolution` must be one of 256, 512, 1024, 2048 .*, got 768"),
        ("512x512", 0, "`aspect_ratio_buckets` must be 'pixart' or sizes .*, got '512x512'"),
        ("", 0, "`aspect_ratio_buckets` must be 'pixart' or sizes .*, got ''"),
        ("24,32", 0, "sides that are multiples of 16, got 24 x 32"),
        ("0,32", 0, "sides that are multiples of 16, got 0 x 32"),
        (None, 100, "sides that are multiples of 16, got 100 x 100"),
    ],
)
def test_errors(choice, resolution, message):
    with pytest.raises(ValueError, match=message):
        parse_buckets(choice, resolution, 16)
