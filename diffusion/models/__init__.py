"""diffusers models. The modules import `ModelMixin`: pipelines find a class's loader there."""
