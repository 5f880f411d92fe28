"""The named backbones: official variant, and the numbers of the papers' table for each."""

import timm

import lintra.vision  # noqa: F401 - registers the models

# name -> (official variant of layouts.json, parameters M, GMAC)
NAMES = {
    "deit_tiny_prepbn_patch16_224": ("deit_t_prepbn", 5.717, 1.25),
    "deit_small_prepbn_patch16_224": ("deit_s_prepbn", 22.07, 4.60),
    "deit_tiny_slab_patch16_224": ("slab_deit_t", 6.198, 1.14),
    "deit_small_slab_patch16_224": ("slab_deit_s", 22.99, 4.36),
    "deit_tiny_inline_patch16_224": ("inline_deit_tiny", 6.48, 1.11),
    "deit_small_inline_patch16_288": ("inline_deit_small", 16.74, 4.97),
    "deit_base_inline_patch16_448": ("inline_deit_base", 23.80, 17.17),
    "swin_tiny_prepbn_patch4_window7_224": ("swin_t_prepbn", 28.29, 4.49),
    "swin_tiny_slab_patch4_window56_224": ("slab_swin_t", 29.22, 4.48),
    "swin_small_slab_patch4_window56_224": ("slab_swin_s", 50.55, 8.73),
    "swin_base_slab_patch4_window56_224": ("slab_swin_b", 89.03, 15.42),
    "swin_tiny_inline_patch4_window56_224": ("inline_swin_t", 29.22, 4.46),
    "swin_small_inline_patch4_window56_224": ("inline_swin_s", 49.79, 8.72),
    "swin_base_inline_patch4_window56_224": ("inline_swin_b", 88.35, 15.40),
    "swin_base_inline_patch4_window96_384": ("inline_swin_b_384", 88.47, 46.20),
    "pvt_tiny_prepbn": ("pvt_t_prepbn", 13.24, 1.93),
    "pvt_small_prepbn": ("pvt_s_prepbn", 24.51, 3.81),
    "pvt_medium_prepbn": ("pvt_m_prepbn", 44.25, 6.65),
    "pvt_tiny_slab": ("slab_pvt_t", 12.16, 2.04),
    "pvt_small_slab": ("slab_pvt_s", 21.68, 4.03),
    "pvt_medium_slab": ("slab_pvt_m", 37.27, 7.03),
    "pvt_tiny_inline": ("inline_pvt_tiny", 12.03, 1.98),
    "pvt_small_inline": ("inline_pvt_small", 21.56, 3.92),
    "pvt_medium_inline": ("inline_pvt_medium", 37.62, 6.86),
    "pvt_large_inline": ("inline_pvt_large", 51.15, 10.13),
    "cswin_tiny_slab_224": ("slab_cswin_t", 21.23, 4.32),
    "cswin_small_slab_224": ("slab_cswin_s", 35.49, 6.78),
    "cswin_tiny_inline_224": ("inline_cswin_tiny", 20.61, 4.31),
    "cswin_small_inline_224": ("inline_cswin_small", 33.03, 6.77),
    "cswin_base_inline_224": ("inline_cswin_base", 73.41, 14.89),
    "cswin_base_inline_384": ("inline_cswin_base_384", 73.41, 46.22),
}


def small_arguments(name: str) -> dict:
    """Constructor arguments that shrink a name to a fraction of a second, keeping its kinds."""
    family = name.split("_")[0]
    if family == "deit":
        return {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2}
    if family == "pvt":
        return {
            "img_size": 64, "embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1),
            "num_heads": (1, 2, 2, 4),
        }  # fmt: skip
    shrunk = {"img_size": 64, "embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 2, 4)}
    if family == "swin":
        shrunk["window_size"] = 4
        if "base_inline" in name:
            shrunk["attn"] = ("inline", "inline", ("inline", "softmax"), "softmax")
    return shrunk


def create_small(name: str, **kwargs):
    """A shrunken model of that name."""
    return timm.create_model(name, **{**small_arguments(name), "num_classes": 7, **kwargs})
