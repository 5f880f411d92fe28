"""Loads the authors' SLAB and InLine checkpoints into our models, with nothing left over."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import (
    LinearCSwinTransformer,
    LinearPyramidTransformer,
    LinearSwinTransformer,
    LinearVisionTransformer,
)
from .models.loading import filter_checkpoint
from .norm import PRepBN, RepBN
from .unpickling import read_checkpoint_file

State = dict[str, Tensor]

# Beginning of an official name -> of ours, by the first pattern that matches. In templates {0},
# {1}, ... are the groups, {stage} and {next} the first group less and plus one.
_HEAD = (r"head\.(?!fc\.)", "head.fc.")
RULES: dict[type[nn.Module], list[tuple[str, str]]] = {
    LinearVisionTransformer: [],
    LinearSwinTransformer: [
        _HEAD,
        # The authors downsample at the end of a stage, timm at the start of the next.
        (r"layers\.(\d+)\.downsample\.", "layers.{next}.downsample."),
    ],
    LinearPyramidTransformer: [
        _HEAD,
        (r"patch_embed1\.", "patch_embed."),
        (r"patch_embed(\d)\.", "stages.{stage}.downsample."),
        (r"pos_embed(\d)$", "stages.{stage}.pos_embed"),
        (r"block(\d)\.", "stages.{stage}.blocks."),
    ],
    LinearCSwinTransformer: [
        _HEAD,
        (r"stage1_conv_embed\.0\.", "patch_embed.proj."),
        (r"stage1_conv_embed\.2\.", "patch_embed.norm."),
        (r"merge(\d)\.conv\.", "stages.{0}.downsample.proj."),
        (r"merge(\d)\.norm\.", "stages.{0}.downsample.norm."),
        (r"stage(\d)\.(\d+)\.(qkv|proj)\.", "stages.{stage}.blocks.{1}.attn.{2}."),
        (r"stage(\d)\.(\d+)\.attns\.(\d)\.get_v\.", "stages.{stage}.blocks.{1}.attn.lepe.{2}."),
        (r"stage(\d)\.(\d+)\.attns\.0\.", "stages.{stage}.blocks.{1}.attn."),
        (r"stage(\d)\.", "stages.{stage}.blocks."),
    ],
}


def _apply_rule(rule: tuple[str, str], name: str) -> str | None:
    """The new name, None if the rule is for others."""
    match = re.match(rule[0], name)
    if match is None:
        return None
    groups = match.groups()
    numbers = {"stage": int(groups[0]) - 1, "next": int(groups[0]) + 1} if groups else {}
    return rule[1].format(*groups, **numbers) + name[match.end() :]


# Entries that take no part in evaluation or follow from the configuration.
DEAD = [
    (r"(.+\.)?(warm|iter|total_step)$", "counter of the schedule"),
    (r"(.+\.)?(relative_position_index|attn_mask)$", "buffer that follows from the window"),
    (r"(.+\.)?attn\.scale$", "never used"),
    (r"cls_token$", "never used"),
]

CONTAINER_KEYS = ("model", "state_dict", "module")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema")


@dataclass
class OfficialReport:
    """What `load_official` did.

    Attributes:
        source: entry of the container that held the weights, with dots where nested; "" for a bare
            state dict.
        loaded: names of ours that were filled.
        renamed: official name -> ours, where they differ.
        dropped: official name -> why it was left out.
        resized: names of position tables that were resampled.
        untouched: names of ours that the checkpoint does not hold and evaluation does not read.
        mix: share of LayerNorm at which training stopped, None without PRepBN counters.
    """

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    mix: float | None = None

    def __str__(self) -> str:
        reasons = sorted(set(self.dropped.values()))
        return (
            f"loaded {len(self.loaded)} tensors from {self.source or 'a bare state dict'},"
            f" renamed {len(self.renamed)}, resized {len(self.resized)},"
            f" dropped {len(self.dropped)} ({', '.join(reasons) or 'nothing'}),"
            f" left {len(self.untouched)} as they were"
        )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _find_state(container: Mapping[str, Any], order: Sequence[str]) -> tuple[str, State] | None:
    """The first state dict under the names of `order`, with its dotted path; else the container."""
    for key in order:
        inner = container.get(key)
        if isinstance(inner, Mapping) and (found := _find_state(inner, order)) is not None:
            path, state = found
            return f"{key}.{path}".rstrip("."), state
    return ("", dict(container)) if _is_state(container) else None


def extract_weights(checkpoint: Any, *, prefer_ema: bool = True) -> tuple[str, State]:
    """The state dict in a container, and the name of its entry.

    Args:
        checkpoint: a state dict, or a mapping that holds some under the usual names, maybe nested.
        prefer_ema: take averaged weights where there are any.

    Raises:
        ValueError: no weights under any of the names.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"`checkpoint` must be a path or a mapping, got {type(checkpoint).__name__}"
        )
    order = EMA_KEYS + CONTAINER_KEYS if prefer_ema else CONTAINER_KEYS
    source, state = _find_state(checkpoint, order) or ("", None)
    if state is None:
        names = ", ".join(order)
        raise ValueError(
            f"`checkpoint` must be a state dict or hold one under {names},"
            f" got keys {', '.join(map(str, list(checkpoint)[:8]))}"
        )
    # DistributedDataParallel and torch.compile prefix every name.
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")
    return source, {
        prefix.sub("", str(name)): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


class _Converter:
    """Renames one official state dict for one model, keeping a report."""

    def __init__(self, model: nn.Module, report: OfficialReport) -> None:
        rules = next((rules for kind, rules in RULES.items() if isinstance(model, kind)), None)
        if rules is None:
            raise ValueError(
                f"`model` must be a backbone of lintra.vision, got {type(model).__name__}"
            )
        self.rules = rules
        self.report = report
        self.expected = model.state_dict()
        self.norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (PRepBN, RepBN)) and not name.endswith("repbn")
        }

    def _rename(self, name: str) -> str:
        renamed = (_apply_rule(rule, name) for rule in self.rules)
        name = next((new for new in renamed if new is not None), name)
        # A linear CSwin block has one LePE, a softmax block one a branch.
        if name not in self.expected:
            name = re.sub(r"\.attn\.lepe\.0\.", ".attn.lepe.", name)
        return name

    def _place_norm(self, name: str, progressive: set[str]) -> str | None:
        """Our name of an entry of a norm, None for a LayerNorm that the model does not have."""
        for site, norm in self.norms.items():
            if not name.startswith(site + "."):
                continue
            leaf = name[len(site) + 1 :]
            if site in progressive:
                leaf = re.sub(r"^norm1\.", "ln.", re.sub(r"^norm2\.", "repbn.", leaf))
            elif leaf.startswith(("alpha", "bn.")):
                leaf = "repbn." + leaf
            if isinstance(norm, RepBN):
                if leaf.startswith("ln."):
                    return None
                leaf = leaf.removeprefix("repbn.")
            return f"{site}.{leaf}"
        return name

    def _mix(self, state: State) -> float | None:
        left, total = (
            next((v for k, v in state.items() if k.endswith(name)), None)
            for name in ("norm1.iter", "norm1.total_step")
        )
        if left is None or total is None:
            return None
        return min(1.0, float(left) / float(total)) if float(total) > 0 else 0.0

    def convert(self, state: State) -> State:
        names = {name: self._rename(name) for name in state}
        progressive = {
            new.removesuffix(".norm2.bn.running_mean")
            for new in names.values()
            if new.endswith(".norm2.bn.running_mean")
        }
        self.report.mix = self._mix(state)
        converted = {}
        for name, new in names.items():
            placed = self._place_norm(new, progressive)
            if placed is None:
                self.report.dropped[name] = "LayerNorm that only training reads"
                continue
            if placed not in self.expected:
                reason = next((why for pattern, why in DEAD if re.match(pattern, placed)), None)
                if reason is not None:
                    self.report.dropped[name] = reason
                    continue
            converted[placed] = state[name]
            if placed != name:
                self.report.renamed[name] = placed
        return converted


def _may_be_missing(name: str, model: nn.Module) -> bool:
    """Whether evaluation does not read the entry: the LayerNorm of a PRepBN."""
    path, _, leaf = name.rpartition(".ln.")
    return bool(path) and leaf != "" and isinstance(model.get_submodule(path), PRepBN)


def _fail(model: nn.Module, problems: dict[str, list[str]]) -> None:
    texts = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if texts:
        raise ValueError(
            f"`checkpoint` must fit {type(model).__name__} exactly, got {'; '.join(texts)}"
        )


def _check_names(converted: State, model: nn.Module, report: OfficialReport) -> None:
    """Every entry has its place, and every place its entry."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in converted]
    report.untouched = [name for name in missing if _may_be_missing(name, model)]
    _fail(
        model,
        {
            "missing": [name for name in missing if name not in report.untouched],
            "left over": [name for name in converted if name not in expected],
        },
    )


def _check_shapes(converted: State, model: nn.Module) -> None:
    expected = model.state_dict()
    misfits = [
        f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
        for name, value in converted.items()
        if value.shape != expected[name].shape
    ]
    _fail(model, {"of another shape": misfits})


def load_official(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], *, prefer_ema: bool = True
) -> OfficialReport:
    """Fills a model with weights of the official SLAB or InLine repositories.

    Takes plain RepBN, LayerNorm + RepBN and LayerNorm layouts, bare state dicts and training
    containers. Position tables of another image size are resampled. PRepBN goes on from where the
    checkpoint's counters stopped.

    Args:
        model: the backbone of that architecture, e.g. ``timm.create_model("deit_tiny_slab_...")``.
        checkpoint: a file, read without running its code, or what was loaded from one.
        prefer_ema: take averaged weights where the container has them.

    Returns:
        What was loaded, renamed, dropped and resized.

    Raises:
        ValueError: an unreadable file, no weights in it, or an entry missing, left over or of
            another shape. The model is unchanged then.
    """
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint_file(checkpoint)
    report = OfficialReport()
    report.source, state = extract_weights(checkpoint, prefer_ema=prefer_ema)
    converted = _Converter(model, report).convert(state)
    _check_names(converted, model, report)
    resized = filter_checkpoint(converted, model)
    _check_shapes(resized, model)
    report.resized = [
        name for name, value in resized.items() if value.shape != converted[name].shape
    ]
    with torch.no_grad():
        model.load_state_dict(resized, strict=False)
    report.loaded = sorted(resized)
    if report.mix is not None:
        for module in model.modules():
            if isinstance(module, PRepBN):
                module.set_mix(report.mix)
    return report
