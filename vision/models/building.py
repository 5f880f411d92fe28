"""Builds and saves models so that any timm of the supported range opens them again.

timm 1.0.31 records a model's constructor arguments and saves them; before, whatever a name's preset
does not say was lost, and a saved model of another size did not load.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._hub import save_for_hf
from torch import nn

from .loading import filter_checkpoint

try:
    from timm.models._input import get_model_args, update_model_input_size
except ImportError:  # timm < 1.0.31
    get_model_args = update_model_input_size = None

# Not part of the architecture.
_RUNTIME = ("features_only", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_RUNTIME_ENDINGS = ("device", "dtype", "drop_rate", "drop_path_rate", "out_indices")


def record_input_size(model: nn.Module, img_size: tuple[int, int], **arguments: Any) -> None:
    """Notes constructor arguments that `set_input_size` has changed."""
    if update_model_input_size is not None:
        update_model_input_size(model, img_size, **arguments)
    else:
        _record(model, img_size=img_size, **arguments)


def _record(model: Any, **arguments: Any) -> None:
    model._model_args = {**getattr(model, "_model_args", {}), **arguments}


def _leave_out_idle_dropout(model: nn.Module) -> None:
    """Identities for dropout of rate zero, which costs the host three calls to give its input."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Of `attn_drop` attention reads the rate.
            if isinstance(child, nn.Dropout) and child.p == 0 and name != "attn_drop":
                setattr(module, name, nn.Identity())


def build_backbone(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg``, noting the constructor arguments where timm does not.

    Dropout of rate zero is left out.
    """
    model = build_model_with_cfg(model_class, variant, pretrained, **kwargs)
    _leave_out_idle_dropout(model)
    if get_model_args is None and not kwargs.get("features_only"):
        own = ("pretrained_filter_fn", "feature_cfg", *_RUNTIME)
        arguments = {
            name: value
            for name, value in kwargs.items()
            if name not in own and not name.endswith(_RUNTIME_ENDINGS)
        }
        _record(model, **arguments)
    return model


def build_staged_backbone(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    **kwargs: Any,
) -> nn.Module:
    """`build_backbone` of four stages, which also give their features."""
    features = {"out_indices": out_indices, "feature_cls": "getter", "flatten_sequential": True}
    return build_backbone(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=filter_checkpoint,
        feature_cfg=features,
        **kwargs,
    )


def save_backbone(
    model: nn.Module, folder: str | Path, model_args: dict[str, Any] | None = None
) -> None:
    """Writes weights (safetensors) and configuration.

    ``timm.create_model("local-dir:<folder>", pretrained=True)`` opens the folder, once
    ``lintra.vision`` is imported.

    Args:
        model: what timm's ``create_model`` returned.
        folder: made if need be.
        model_args: constructor arguments, for models of timm's own whose arguments an old timm
            does not record.
    """
    arguments = None
    if get_model_args is None:
        arguments = {**(model_args or {}), **getattr(model, "_model_args", {})}
        arguments = {k: v for k, v in arguments.items() if not k.endswith(_RUNTIME_ENDINGS)}
        arguments["num_classes"] = model.num_classes
        arguments["in_chans"] = getattr(model, "in_chans", 3)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
