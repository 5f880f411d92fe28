"""One training loop for all models: data, recipe, loss, checkpoints, validation."""
