"""The backbones."""
