"""Training of the backbones: a typed recipe and one loop, on timm's parts under accelerate."""
