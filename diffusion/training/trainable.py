"""Which parameters of a student learn, and their values before, between and after runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..clear_weights import clear_parameter_names, load_clear_weights
from ..io import load_transformer
from ..models.clear import ClearMixin

TRAINED_FILE = "trained.safetensors"
LORA_FOLDER = "lora"


def is_clear(model: nn.Module) -> bool:
    """The model has the local attention of CLEAR."""
    return isinstance(model, ClearMixin)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that learn."""
    return [name for name, value in model.named_parameters() if value.requires_grad]


def trains_all(model: nn.Module) -> bool:
    """No parameter is frozen."""
    return all(value.requires_grad for value in model.parameters())


def choose_trainable(
    student: ModelMixin, choice: str, *, dtype: torch.dtype, rank: int, lora_alpha: int | None
) -> None:
    """Makes parameters of the student learn, in place, and freezes the others.

    A parameter that learns gets storage of its own: a teacher with which the student shares its
    weights keeps them.

    Args:
        student: the model.
        choice: `all`; `clear`, the set that CLEAR trains; or `lora`, low-rank updates of the
            projections in that set, by peft, with the pooling kernels.
        dtype: of what learns.
        rank, lora_alpha: of the updates; an alpha of None is the rank.

    Raises:
        ValueError: `clear` or `lora` for a model other than CLEAR's. ImportError: no peft.
    """
    if choice == "all":
        student.requires_grad_(True)
        names = [name for name, _ in student.named_parameters()]
    else:
        if not is_clear(student):
            raise ValueError(
                f"`model.trainable` must be all for a {type(student).__name__}, got {choice!r}"
            )
        student.requires_grad_(False)
        names = clear_parameter_names(student)
        if choice == "lora":
            names = _add_lora(student, names, rank, lora_alpha)
    for name in names:
        owner, attribute = _owner(student, name)
        value = getattr(owner, attribute)
        setattr(owner, attribute, nn.Parameter(value.detach().to(dtype, copy=True)))


def _add_lora(
    student: ModelMixin, names: Sequence[str], rank: int, lora_alpha: int | None
) -> list[str]:
    from peft import LoraConfig

    pooling = [name for name in names if name.endswith("spatial_weight")]
    layers = sorted({name.rpartition(".")[0] for name in names if name not in pooling})
    config = LoraConfig(r=rank, lora_alpha=lora_alpha or rank, target_modules=layers)
    student.add_adapter(config)
    return [*pooling, *(name for name, _ in student.named_parameters() if ".lora_" in name)]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


@torch.no_grad()
def start_from(student: ModelMixin, path: str) -> None:
    """Gives the student the weights of an earlier stage; those it does not train stay shared.

    Args:
        student: before anything is frozen or added; CLEAR models replace only what CLEAR trains.
        path: transformer or pipeline folder, or for CLEAR models a file of official weights.

    Raises:
        ValueError: weights of another model. FileNotFoundError: no such folder or file.
    """
    if path.endswith(".safetensors"):
        load_clear_weights(student, path)
        return
    earlier = load_transformer(path)
    if type(earlier) is not type(student):
        raise ValueError(
            f"`model.pretrained_model_name_or_path` must be a {type(student).__name__}, got a"
            f" {type(earlier).__name__}"
        )
    weights = earlier.state_dict()
    if is_clear(student):
        load_clear_weights(
            student, {name: weights[name] for name in clear_parameter_names(earlier)}
        )
        return
    mine = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if mine != theirs:
        differing = sorted(n for n in mine | theirs if mine.get(n) != theirs.get(n))
        raise ValueError(
            "`model.pretrained_model_name_or_path` must have the student's weights, got"
            f" {len(differing)} that differ: {', '.join(differing[:3])}"
        )
    student.load_state_dict(weights)


def save_trained(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the parameters that learn, out of `weights`, as one flat file.

    For CLEAR's set these are the names of its official files.
    """
    tensors = {name: weights[name].detach().contiguous().cpu() for name in trained_names(model)}
    save_file(tensors, folder / TRAINED_FILE)


@torch.no_grad()
def load_trained(model: nn.Module, file: Path) -> None:
    """Reads what `save_trained` wrote into the parameters, in place.

    Raises:
        ValueError: a file of another set of parameters.
    """
    tensors = load_file(file)
    names = trained_names(model)
    if set(tensors) != set(names):
        raise ValueError(f"{file} must hold the {len(names)} trained tensors, got {len(tensors)}")
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].copy_(tensors[name])


def has_lora(model: nn.Module) -> bool:
    """The model has adapters of peft."""
    return bool(getattr(model, "peft_config", None))


def finish(model: ModelMixin, output_dir: Path) -> None:
    """Makes a trained model an ordinary one, in place: no adapters, one dtype, frozen as trained.

    Low-rank updates are written to `lora/`, as `load_lora_weights` of a pipeline reads them, and
    then added to the weights; the frozen weights that a teacher shares are not touched.
    """
    if has_lora(model):
        from diffusers import FluxPipeline
        from peft import get_peft_model_state_dict

        FluxPipeline.save_lora_weights(
            output_dir / LORA_FOLDER, transformer_lora_layers=get_peft_model_state_dict(model)
        )
        model.fuse_lora(safe_fusing=True)  # into copies: plain fusing writes into shared storage
        model.unload_lora()
    frozen = [value.dtype for value in model.parameters() if not value.requires_grad]
    if frozen:
        model.to(frozen[0])
