"""Layer normalisation with a scale and a shift a sample, also after a gated sum; that sum alone."""

from .api import ada_layer_norm, gated_ada_layer_norm, gated_add

__all__ = ["ada_layer_norm", "gated_ada_layer_norm", "gated_add"]
