"""Recipes, one YAML file a run, and `accelerate/` files for `accelerate launch --config_file`."""
