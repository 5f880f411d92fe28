"""Layer normalisation with a scale and a shift a sample, also after a gated sum."""

from .api import ada_layer_norm, gated_ada_layer_norm

__all__ = ["ada_layer_norm", "gated_ada_layer_norm"]
