"""`lintra sample`: a grid of images from a DiT or LiT, or one image of FLUX or SD3 in stages."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from lintra.diffusion.io import load_pipeline
from lintra.diffusion.sampling import SCHEDULERS, balanced_labels, sample_images
from lintra.diffusion.training.validation import save_grid

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lintra sample", description=__doc__)
    parser.add_argument("pipeline", type=str, help="pipeline folder")
    parser.add_argument(
        "--output", type=str, help="picture to write, samples.png; folder, cascade, with --stages"
    )
    parser.add_argument(
        "--num_inference_steps", type=int, nargs="+", help="50; 20 with --stages, or one for each"
    )
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+", help="1 is none; one for each of --stages"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", type=str, default="fp32", help=f"one of {', '.join(_DTYPES)}")
    parser.add_argument("--device", type=str, help="default: cuda if there is one")

    classes = parser.add_argument_group("DiT and LiT")
    classes.add_argument("--labels", type=list[int], help="classes, e.g. '[3, 5]'; default: spread")
    classes.add_argument("--num_images", type=int, default=16, help="number, without --labels")
    classes.add_argument(
        "--num_classes", type=int, help="classes to spread over; default: all named"
    )
    classes.add_argument("--scheduler", type=str, help=f"one of {', '.join(SCHEDULERS)}")
    classes.add_argument("--batch_size", type=int, default=64)
    classes.add_argument("--columns", type=int, default=8)

    cascade = parser.add_argument_group("FLUX and SD3")
    cascade.add_argument(
        "--stages", type=str, nargs="+", help="growing sizes, pixels: 1024 2048 4096, or 512x1024"
    )
    cascade.add_argument("--prompt", type=str, help="text, or a safetensors file of embeddings")
    cascade.add_argument("--negative_prompt", type=str, help="of SD3")
    cascade.add_argument(
        "--strength", type=float, nargs="+", help="0.7; one, or one for each stage"
    )
    cascade.add_argument("--shift", type=float, default=3.0, help="of the stages after the first")
    cascade.add_argument("--image", type=str, help="to start from, instead of noise")
    cascade.add_argument(
        "--radius", type=float, help="make a stock transformer local, with the stock as teacher"
    )
    cascade.add_argument("--clear", type=str, help="official CLEAR weights for the local one")
    cascade.add_argument("--teacher", type=str, help="folder of a stock transformer")
    cascade.add_argument("--teacher_stages", type=int, help="default: 1 if there is a teacher")
    cascade.add_argument("--no_vae_tiling", action="store_true")
    cascade.add_argument("--offload", action="store_true", help="one model on the GPU at a time")
    return parser


def _single(name: str, values: list[Any] | None, default: Any) -> Any:
    if values is None:
        return default
    if len(values) != 1:
        raise ValueError(f"`{name}` must be one value without --stages, got {len(values)}")
    return values[0]


def _classes(options: Namespace, device: str) -> str:
    steps = _single("num_inference_steps", options.num_inference_steps, 50)
    guidance = _single("guidance_scale", options.guidance_scale, 1.0)
    pipeline = load_pipeline(Path(options.pipeline).absolute(), dtype=_DTYPES[options.dtype])
    pipeline.to(device)
    if not hasattr(pipeline, "labels"):
        raise ValueError(f"`--stages` must be given for a {type(pipeline).__name__}, got none")
    named = len(pipeline.labels) or pipeline.transformer.config.num_embeds_ada_norm
    labels = options.labels or balanced_labels(options.num_images, options.num_classes or named)
    images = sample_images(
        pipeline,
        labels,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=options.seed,
        batch_size=options.batch_size,
        scheduler=options.scheduler,
    )
    output = options.output or "samples.png"
    save_grid(images, Path(output), options.columns)
    return f"{len(images)} images of {images.shape[-1]} px: {output}"


def _stages(options: Namespace, device: str) -> str:
    from .sample_stages import sample_stages

    return sample_stages(options, device, _DTYPES[options.dtype])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for wrong arguments or a folder that is no pipeline."""
    parser = _parser()
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if options.dtype not in _DTYPES:
        parser.error(f"`dtype` must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run: Callable[[Namespace, str], str] = _classes if options.stages is None else _stages
    try:
        print(run(options, device))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
