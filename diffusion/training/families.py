"""How transformers are called in training: one way in, noised latents and a condition."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from diffusers import FluxPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..models.clear import ClearMixin

Condition = Mapping[str, Tensor]


def _input_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """float32 under autocast, which rounds where a layer wants it; else the weights' dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.float32
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


class Family(ABC):
    """Calls transformers of one kind.

    Args:
        config: the transformer's configuration.
    """

    process: ClassVar[Literal["ddpm", "flow"]]

    def __init__(self, config: Mapping[str, object]):
        self.config = config

    def __call__(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        """The model's prediction.

        Args:
            model: the transformer, perhaps wrapped for several processes.
            noised: x_t ``(B, C, H, W)`` float32.
            timestep: ``(B,)``, steps or levels.
            condition: tensors with a row a sample, by the names that the family knows.

        Returns:
            ``(B, C, H, W)``, or ``(B, 2 C, H, W)`` with a variance.
        """
        dtype = _input_dtype(model, noised.device)
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in condition.items()
        }
        return self._call(model, noised.to(dtype), timestep, inputs)

    @abstractmethod
    def _call(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor: ...


class ClassFamily(Family):
    """DiT and LiT; the condition is `class_labels`."""

    process = "ddpm"

    def _call(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        labels = condition["class_labels"]
        return model(noised, timestep=timestep, class_labels=labels, return_dict=False)[0]


class PixArtFamily(Family):
    """PixArt; the condition is `prompt_embeds` and `prompt_attention_mask`.

    Models of 1024 px that also take a size are told that of the batch, as pipelines tell it.

    Args:
        config: the transformer's configuration.
        use_additional_conditions: the model takes resolution and aspect ratio.
        vae_reduction: pixels of a latent's side.
    """

    process = "ddpm"

    def __init__(
        self, config: Mapping[str, object], use_additional_conditions: bool, vae_reduction: int
    ):
        super().__init__(config)
        self.use_additional_conditions = use_additional_conditions
        self.vae_reduction = vae_reduction

    def _call(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        batch, _, height, width = noised.shape
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.use_additional_conditions:
            sides = [self.vae_reduction * height, self.vae_reduction * width]
            size["resolution"] = noised.new_tensor(sides).expand(batch, 2)
            size["aspect_ratio"] = noised.new_tensor([height / width]).expand(batch, 1)
        return model(
            noised,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs=size,
            return_dict=False,
        )[0]


class SD3Family(Family):
    """SD3; the condition is `prompt_embeds` and `pooled_prompt_embeds`."""

    process = "flow"

    def _call(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        return model(
            hidden_states=noised,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            timestep=1000 * timestep,
            return_dict=False,
        )[0]


class FluxFamily(Family):
    """FLUX on packed latents; the condition is `prompt_embeds` and `pooled_prompt_embeds`.

    Args:
        config: the transformer's configuration.
        guidance_scale: given to student and teacher alike, if they take guidance.
    """

    process = "flow"

    def __init__(self, config: Mapping[str, object], guidance_scale: float):
        super().__init__(config)
        self.guidance_scale = guidance_scale

    def _call(
        self, model: nn.Module, noised: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        batch, channels, height, width = noised.shape
        device, embeds = noised.device, condition["prompt_embeds"]
        guidance = None
        if self.config["guidance_embeds"]:
            guidance = torch.full((batch,), self.guidance_scale, device=device)
        # In float32: ids above 256 are no numbers of bfloat16.
        grid = height // 2, width // 2
        ids = FluxPipeline._prepare_latent_image_ids(batch, *grid, device, torch.float32)
        # CLEAR would read the grid off the ids, for which the host waits for the device.
        is_local = isinstance(getattr(model, "module", model), ClearMixin)
        out = model(
            hidden_states=FluxPipeline._pack_latents(noised, batch, channels, height, width),
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled_prompt_embeds"],
            timestep=timestep,
            guidance=guidance,
            img_ids=ids,
            txt_ids=ids.new_zeros(embeds.shape[1], 3),
            joint_attention_kwargs={"spatial_shape": grid} if is_local else None,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(out, height, width, 1)


def attention_layer_names(
    model: ModelMixin, numbers: list[int] | None, default_all: bool = False
) -> list[str]:
    """Names of the attention layers of a CLEAR model whose outputs are compared.

    Args:
        model: the student.
        numbers: of blocks, counted as in `full_attention_layers`; None for the default.
        default_all: the default is all layers that are not full attention anyway, instead of the
            paper's choice: every fourth block, from the second on, of FLUX's single blocks (1, 5,
            ..., 37) or of SD3's.

    Raises:
        ValueError: a number that the model does not have.
    """
    layers = [(index, name) for index, name, _ in model._attention_layers()]
    last = layers[-1][0]
    if numbers is not None:
        if outside := [number for number in numbers if not 0 <= number <= last]:
            raise ValueError(f"`model.attention_layers` must be in 0 .. {last}, got {outside[0]}")
        return [name for index, name in layers if index in set(numbers)]
    if default_all:
        return [name for index, name in layers if index not in model.config.full_attention_layers]
    kind = model._block_lists[-1]
    return [
        name
        for _, name in layers
        if name.startswith(f"{kind}.") and int(name.split(".")[1]) % 4 == 1
    ]
