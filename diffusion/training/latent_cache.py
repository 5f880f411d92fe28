"""An on-disk cache of VAE latents in safetensors shards, bound to the VAE's weights."""

import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .images import ImageSource
from .shards import INDEX_NAME, Shards, read_index

FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INDEX_KEYS = (
    "format_version",
    "vae_id",
    "vae_fingerprint",
    "resolution",
    "count",
    "classes",
    "dtype",
    "random_flip",
    "latent_shape",
    "shards",
)


def weights_fingerprint(module: nn.Module) -> str:
    """First 16 hex digits of a SHA-256 over the names, dtypes, shapes and bytes of the weights.

    The same weights in another dtype count as others, because their latents differ too.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()[:16]


def build_latent_cache(
    source: ImageSource,
    vae: ModelMixin,
    folder: str | Path,
    *,
    batch_size: int,
    device: str | torch.device,
    random_flip: bool = False,
    vae_id: str,
    resolution: int,
    dtype: torch.dtype = torch.float32,
    items_per_shard: int = 4096,
    num_workers: int = 0,
) -> Path:
    """Encodes every image once and writes the posterior's mean and standard deviation.

    Both are stored as the diffusion model sees them, ``(mean - shift) * scale`` and
    ``std * scale``, so that a latent is ``mean + std * noise``. The folder appears under its name
    only when it is complete; until then it is a hidden ``.partial`` folder beside it.

    Args:
        source: images of side ``resolution`` with as many channels as the VAE takes.
        vae: an AutoencoderKL, or what behaves like it (``encode(x).latent_dist`` and a config
            with ``scaling_factor`` and perhaps ``shift_factor``); it is moved to ``device``.
        folder: where the cache will be; must not exist yet, or be empty.
        batch_size: images encoded at once.
        random_flip: stores the latents of the mirrored images as well.
        vae_id: name or path of the VAE, for people to read.
        resolution: side of the images, in pixels.
        dtype: of the stored latents: float32, float16 or bfloat16.
        items_per_shard: images in one file.
        num_workers: processes that read images.
    Returns:
        ``folder``.
    Raises:
        ValueError: images that do not fit the VAE, a folder in use, latents that are not finite.
        TypeError: another dtype, or a VAE without a Gaussian posterior.
    """
    folder = Path(folder)
    _check_build(source, vae, folder, resolution, dtype)
    vae = vae.to(device).eval()
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir(parents=True)
    try:
        shards: list[dict[str, Any]] = []
        with tqdm(total=len(source), desc="encoding latents", unit="img", disable=None) as bar:
            for start in range(0, len(source), items_per_shard):
                rows = range(start, min(start + items_per_shard, len(source)))
                loader = DataLoader(
                    Subset(source, rows), batch_size=batch_size, num_workers=num_workers
                )
                tensors = _encode(loader, vae, random_flip, dtype, bar)
                file = f"shard-{len(shards):05d}.safetensors"
                save_file(tensors, partial / file)
                shards.append({"file": file, "count": len(rows)})
        index = {
            "format_version": FORMAT_VERSION,
            "vae_id": vae_id,
            "vae_fingerprint": weights_fingerprint(vae),
            "resolution": resolution,
            "count": len(source),
            "classes": source.classes,
            "dtype": str(dtype).removeprefix("torch."),
            "random_flip": random_flip,
            "latent_shape": list(tensors["mean"].shape[2:]),
            "shards": shards,
        }
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
        partial.rename(folder)
    except BaseException:
        # KeyboardInterrupt too: tens of gigabytes must not stay behind.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


class LatentCache(Dataset):
    """Latents that ``build_latent_cache`` wrote.

    An item is ``{"mean", "std": float32 (V, c, h, w), "label": int}``. ``V`` is ``num_views``: 1,
    or 2 where the mirrored images were stored too, which then come second.

    Args:
        folder: the cache.
        vae_fingerprint: ``weights_fingerprint`` of the VAE in use; ``None`` takes any.
        resolution: side of the images in pixels; ``None`` takes any.
    Attributes:
        classes, labels: as of the image source; labels ``(N,)`` int64.
        num_views, latent_shape: ``V`` and ``(c, h, w)``.
        vae_id, vae_fingerprint, resolution: what it was made with.
    Raises:
        ValueError: no cache, one of another VAE or resolution, a missing or damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vae_fingerprint: str | None = None,
        resolution: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder, _INDEX_KEYS, FORMAT_VERSION, "latent")
        self.vae_id: str = index["vae_id"]
        self.vae_fingerprint: str = index["vae_fingerprint"]
        self.resolution: int = index["resolution"]
        self.classes: list[str] = index["classes"]
        self.num_views = 2 if index["random_flip"] else 1
        self.latent_shape: tuple[int, int, int] = tuple(index["latent_shape"])
        if vae_fingerprint not in (None, self.vae_fingerprint):
            raise ValueError(
                f"latent cache {self.folder} must be made with the VAE {vae_fingerprint}, "
                f"got one made with {self.vae_fingerprint} ({self.vae_id})"
            )
        if resolution not in (None, self.resolution):
            raise ValueError(
                f"latent cache {self.folder} must be made at resolution {resolution}, "
                f"got {self.resolution}"
            )
        self._shards = Shards(self.folder, index["shards"], "latent")
        numbers = range(len(index["shards"]))
        self.labels = torch.cat([self._checked_labels(number) for number in numbers])
        if len(self.labels) != index["count"]:
            raise ValueError(
                f"latent cache {self.folder} must hold {index['count']} items, "
                f"got {len(self.labels)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors = self._shards.row(index, ("mean", "std"))
        return {
            **{name: value.float() for name, value in tensors.items()},
            "label": int(self.labels[index]),
        }

    def _checked_labels(self, shard: int) -> Tensor:
        count = self._shards.counts[shard]
        latents = [count, self.num_views, *self.latent_shape]
        self._shards.check(shard, {"mean": latents, "std": latents, "label": [count]})
        return self._shards.handle(shard).get_tensor("label")


def _check_build(
    source: ImageSource, vae: ModelMixin, folder: Path, resolution: int, dtype: torch.dtype
) -> None:
    if dtype not in DTYPES.values():
        raise TypeError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must not exist yet or be empty, got {folder}")
    if source.resolution != resolution:
        raise ValueError(
            f"`source` must have images of side {resolution}, got side {source.resolution}"
        )
    if source.channels != vae.config.in_channels:
        raise ValueError(
            f"`source` must have the VAE's {vae.config.in_channels} channels, got {source.channels}"
        )


@torch.no_grad()
def _encode(
    loader: DataLoader, vae: ModelMixin, random_flip: bool, dtype: torch.dtype, bar: tqdm
) -> dict[str, Tensor]:
    """``mean`` and ``std`` (n, V, c, h, w) and ``label`` (n,) of one shard, on the CPU."""
    parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
    for batch in loader:
        image = batch["image"].to(vae.device)
        image = (image.float() / 127.5 - 1).to(vae.dtype)
        views = [image, image.flip(-1)] if random_flip else [image]
        means, stds = zip(*(scaled_posterior(vae, view) for view in views), strict=True)
        mean = torch.stack(means, dim=1).to("cpu", dtype)
        std = torch.stack(stds, dim=1).to("cpu", dtype)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(
                f"`vae` must give finite latents, got some that are not, "
                f"computed in {vae.dtype} and stored in {dtype}"
            )
        parts["mean"].append(mean)
        parts["std"].append(std)
        parts["label"].append(batch["label"])
        bar.update(len(image))
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


def scaled_posterior(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """``(mean - shift) * scale`` and ``std * scale`` of images in [-1, 1], float32.

    Raises:
        TypeError: a VAE without a Gaussian posterior.
    """
    output = vae.encode(pixels)
    if not hasattr(output, "latent_dist"):
        raise TypeError(f"`vae` must give a Gaussian posterior, got {type(vae).__name__}")
    posterior = output.latent_dist
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
