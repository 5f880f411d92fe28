"""`lintra make-cache`: latents and prompt embeddings for training, computed once."""

import sys
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser

from lintra.diffusion.training.buckets import parse_buckets
from lintra.diffusion.training.captions import read_captions, read_prompts
from lintra.diffusion.training.prompt_cache import PromptCache, describe
from lintra.diffusion.training.prompt_cache_build import build_prompt_cache, build_teacher_cache
from lintra.diffusion.training.text_pipelines import (
    TEXT_PIPELINES,
    open_encoders,
    size_multiple,
    text_family,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lintra make-cache", description=__doc__)
    parser.add_argument("pipeline", type=str, help="folder of a FLUX, SD3 or PixArt pipeline")
    parser.add_argument("output", type=str, help="folder of the cache; a repeated call goes on")
    parser.add_argument("--images", type=str, help="folder of images with captions")
    parser.add_argument(
        "--from_teacher", type=str, help="file of prompts, one a line, for the pipeline to draw"
    )
    parser.add_argument("--caption_column", type=str, default="text", help="in metadata.jsonl")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the square, pixels")
    parser.add_argument(
        "--aspect_ratio_buckets", type=str, help="'pixart', or sizes 'h,w;h,w'; default: the square"
    )
    parser.add_argument("--random_flip", type=bool, default=False, help="mirrored images as well")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt")
    parser.add_argument("--num_inference_steps", type=int, default=28, help="of the teacher")
    parser.add_argument("--guidance_scale", type=float, default=3.5, help="of the teacher")
    parser.add_argument("--seed", type=int, default=0, help="of the first drawn image")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--items_per_shard", type=int, default=256)
    parser.add_argument("--dtype", type=str, default="bf16", help=f"one of {', '.join(_DTYPES)}")
    parser.add_argument("--device", type=str, help="default: cuda if there is one")
    return parser


def _build(options) -> PromptCache:
    captions = (
        None if options.images is None else read_captions(options.images, options.caption_column)
    )
    prompts = None if options.from_teacher is None else read_prompts(options.from_teacher)
    pipeline = open_encoders(
        options.pipeline, dtype=_DTYPES[options.dtype], with_transformer=captions is None
    )
    pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    length = TEXT_PIPELINES[text_family(pipeline)].max_sequence_length
    common = {
        "pipeline_folder": options.pipeline,
        "buckets": parse_buckets(
            options.aspect_ratio_buckets, options.resolution, size_multiple(pipeline)
        ),
        "max_sequence_length": options.max_sequence_length or length,
        "batch_size": options.batch_size,
        "items_per_shard": options.items_per_shard,
    }
    if prompts is None:
        assert captions is not None
        return build_prompt_cache(
            pipeline, options.output, captions, random_flip=options.random_flip, **common
        )
    return build_teacher_cache(
        pipeline,
        options.output,
        prompts,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        **common,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for wrong arguments, captions that do not fit, or a folder that is in use."""
    parser = _parser()
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if options.dtype not in _DTYPES:
        parser.error(f"`dtype` must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    if (options.images is None) == (options.from_teacher is None):
        parser.error("either `images` or `from_teacher` must be given, got both or none")
    try:
        cache = _build(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{describe(cache)}\n{options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
