"""Attention modules and processors for diffusers transformers."""
