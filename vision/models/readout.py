"""The end of every backbone: final norm, pooling and classifier, and how the norm folds away."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..fold import FOLDABLE_NORMS, Foldable, NormSite, affine_module, fold_into_reader

# A mean over tokens, one token and no pooling commute with an affine map; a maximum does not.
COMMUTING_POOLS = ("avg", "token", "")

# Looked up at the end of parameter names.
UNDECAYED = (
    "alpha",
    "cls_token",
    "pos_embed",
    "positional_encoding",
    "reg_token",
    "relative_position_bias_table",
)


def exempt_from_decay(model: nn.Module) -> set[str]:
    """Names of tokens, position tables and RepBN skips, which weight decay would only shrink."""
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in UNDECAYED}


class FoldableReadout(Foldable, nn.Module):
    """Mixin of backbones: folds the final norm into the classifier.

    Folding moves the norm's affine map behind the pooling (`fc_norm`), where it is almost free, and
    also into the classifier, which then reads pooled tokens directly. So logits and pre-logits
    features stay what they were; `forward_features` returns un-normed tokens. A new classifier
    reads features again.

    Expects attributes `norm` and `fc_norm` and, unless overridden, a timm ClassifierHead `head`.
    """

    head_is_folded: bool = False
    head: Any
    norm: nn.Module
    fc_norm: nn.Module
    get_classifier: Callable[[], nn.Module]

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__} must not be compiled with torch.jit.script: norms and attention"
            " choose what they compute in Python, and PyTorch has deprecated scripting."
            " Use torch.compile, torch.export or torch.jit.trace"
        )

    def _pool_type(self) -> str:
        return self.head.global_pool.pool_type

    def _pool(self, x: Tensor) -> Tensor:
        return self.head.global_pool(x)

    def _drop(self, x: Tensor) -> Tensor:
        return self.head.drop(x)

    def _classify(self, x: Tensor) -> Tensor:
        return self.head.fc(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: what `forward_features` returns.
            pre_logits: stop before the classifier.
        """
        x = self._pool(x)
        if pre_logits or not self.head_is_folded:
            x = self.fc_norm(x)
        x = self._drop(x)
        return x if pre_logits else self._classify(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """See timm."""
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]
        self.head_is_folded = False

    def norm_sites(self) -> list[NormSite]:
        names = ("norm", "fc_norm")
        return [
            NormSite(self, name)
            for name in names
            if isinstance(getattr(self, name), FOLDABLE_NORMS)
        ]

    def reparameterize(self) -> None:
        """Folds the final norm."""
        for site in self.norm_sites():
            if self._pool_type() not in COMMUTING_POOLS:
                setattr(self, site.name, affine_module(site.norm))
                continue
            classifier = self.get_classifier()
            if isinstance(classifier, nn.Linear):
                scale, shift = site.norm.affine()
                fold_into_reader(scale, shift, classifier)
                self.head_is_folded = True
            affine = affine_module(site.norm)
            setattr(self, site.name, nn.Identity())
            self.fc_norm = affine
