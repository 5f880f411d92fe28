"""`lintra sample`: a grid of images from any DiT or LiT pipeline folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lintra.diffusion.io import load_pipeline
from lintra.diffusion.sampling import SCHEDULERS, balanced_labels, sample_images
from lintra.diffusion.training.validation import save_grid

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lintra sample", description=__doc__)
    parser.add_argument("pipeline", type=str, help="pipeline folder")
    parser.add_argument("--output", type=str, default="samples.png", help="picture to write")
    parser.add_argument("--labels", type=list[int], help="classes, e.g. '[3, 5]'; default: spread")
    parser.add_argument("--num_images", type=int, default=16, help="number, without --labels")
    parser.add_argument(
        "--num_classes", type=int, help="classes to spread over; default: all named"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1 is none")
    parser.add_argument("--scheduler", type=str, help=f"one of {', '.join(SCHEDULERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--dtype", type=str, default="fp32", help=f"one of {', '.join(_DTYPES)}")
    parser.add_argument("--device", type=str, help="default: cuda if there is one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for wrong arguments or a folder that is no pipeline."""
    parser = _parser()
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if options.dtype not in _DTYPES:
        parser.error(f"`dtype` must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline = load_pipeline(Path(options.pipeline).absolute(), dtype=_DTYPES[options.dtype])
        pipeline.to(device)
        named = len(pipeline.labels) or pipeline.transformer.config.num_embeds_ada_norm
        labels = options.labels or balanced_labels(options.num_images, options.num_classes or named)
        images = sample_images(
            pipeline,
            labels,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            batch_size=options.batch_size,
            scheduler=options.scheduler,
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save_grid(images, Path(options.output), options.columns)
    print(f"{len(images)} images of {images.shape[-1]} px: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
