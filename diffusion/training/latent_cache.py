"""An on-disk cache of VAE latents in safetensors shards, bound to the VAE's weights."""

import bisect
import hashlib
import json
import shutil
import uuid
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .images import ImageSource

INDEX_NAME = "index.json"
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
        index = _read_index(self.folder)
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
        self._files = [self.folder / shard["file"] for shard in index["shards"]]
        self._ends = list(accumulate(shard["count"] for shard in index["shards"]))
        self._open: dict[int, Any] = {}
        labels = [
            self._checked_labels(file, shard["count"])
            for file, shard in zip(self._files, index["shards"], strict=True)
        ]
        self.labels = torch.cat(labels)
        if len(self.labels) != index["count"]:
            raise ValueError(
                f"latent cache {self.folder} must hold {index['count']} items, "
                f"got {len(self.labels)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, got {index}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        if shard not in self._open:
            self._open[shard] = _open_shard(self._files[shard])
        tensors = {name: self._open[shard].get_slice(name)[row].float() for name in ("mean", "std")}
        return {**tensors, "label": int(self.labels[index])}

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to a worker process; it opens its own.
        return {**self.__dict__, "_open": {}}

    def _checked_labels(self, file: Path, count: int) -> Tensor:
        handle = _open_shard(file)
        expected = {
            "mean": [count, self.num_views, *self.latent_shape],
            "std": [count, self.num_views, *self.latent_shape],
            "label": [count],
        }
        found = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        if found != expected:
            raise ValueError(f"latent shard {file} must hold {expected}, got {found}")
        return handle.get_tensor("label")


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
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
    for batch in loader:
        image = batch["image"].to(vae.device)
        image = (image.float() / 127.5 - 1).to(vae.dtype)
        views = [image, image.flip(-1)] if random_flip else [image]
        posteriors = [_posterior(vae, view) for view in views]
        mean = torch.stack([(p.mean.float() - shift) * scale for p in posteriors], dim=1)
        std = torch.stack([p.std.float() * scale for p in posteriors], dim=1)
        mean, std = mean.to("cpu", dtype), std.to("cpu", dtype)
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


def _posterior(vae: ModelMixin, image: Tensor) -> Any:
    output = vae.encode(image)
    if not hasattr(output, "latent_dist"):
        raise TypeError(f"`vae` must give a Gaussian posterior, got {type(vae).__name__}")
    return output.latent_dist


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_NAME
    if not file.is_file():
        raise ValueError(f"`folder` must be a latent cache with an {INDEX_NAME}, got {folder}")
    try:
        index = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be valid JSON, got {error}") from error
    missing = [key for key in _INDEX_KEYS if not isinstance(index, dict) or key not in index]
    if missing:
        raise ValueError(f"{file} must hold {', '.join(_INDEX_KEYS)}, missing {missing}")
    if index["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} must have format version {FORMAT_VERSION}, got {index['format_version']}"
        )
    return index


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"latent cache must hold the shard {file}, got none") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"latent shard {file} must be whole safetensors, got {error}") from error
