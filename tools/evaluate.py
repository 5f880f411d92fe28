"""`lintra evaluate`: class accuracy and Frechet distance of generated images to real ones."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lintra evaluate", description=__doc__)
    parser.add_argument(
        "generated",
        type=str,
        help="pipeline folder, folder of class folders of images, or .npz with images and labels",
    )
    parser.add_argument(
        "--data.source", type=str, default="digits", help="digits, imagefolder, npz"
    )
    parser.add_argument("--data.path", type=str, help="folder or file of the source")
    parser.add_argument("--data.resolution", type=int, default=32, help="side in pixels")
    parser.add_argument("--data.channels", type=int, help="1 or 3; default: as the source")
    parser.add_argument("--data.center_crop", type=bool, default=True, help="false squashes")
    parser.add_argument("--data.image_interpolation_mode", type=str, default="bicubic")
    parser.add_argument("--data.split", type=str, default="all", help="digits: all, train, test")
    parser.add_argument(
        "--space",
        type=str,
        default="digits",
        help="features and classifier: digits, squeezenet1_0_caffe or a torchvision model",
    )
    parser.add_argument("--weights", type=str, help="local weights file of the space")
    parser.add_argument(
        "--class_ids",
        type=list[int],
        help="the classifier's class for each class of the data; default: by name",
    )
    sampling = parser.add_argument_group("sampling, for a pipeline folder")
    sampling.add_argument("--num_images", type=int, default=1000, help="balanced over classes")
    sampling.add_argument("--num_inference_steps", type=int, default=50)
    sampling.add_argument("--guidance_scale", type=float, default=1.0, help="1 is none")
    sampling.add_argument("--scheduler", type=str, help="default: the pipeline's")
    sampling.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", type=str, help="default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for anything wrong; names and paths before a model is loaded."""
    options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        result = _evaluate(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if options.json else _table(result))
    return 0


def _evaluate(options: Namespace) -> dict[str, Any]:
    # Late, so that `--help` and mistyped options do not wait for diffusers.
    from lintra.diffusion import evaluation
    from lintra.diffusion.training.images import open_images

    kind = evaluation.kind_of_generated(options.generated)
    device = _device(options.device)
    for name, least in (("num_images", 2), ("num_inference_steps", 1), ("batch_size", 1)):
        if options[name] < least:
            raise ValueError(f"`{name}` must be at least {least}, got {options[name]}")
    evaluation.check_feature_space(options.space, options.weights)
    data = options.data.as_dict()
    data["interpolation"] = data.pop("image_interpolation_mode")
    source = open_images(**data)
    if kind != "pipeline":
        shape = {name: data[name] for name in ("center_crop", "interpolation")}
        images, labels = evaluation.read_generated(options.generated, source, **shape)
    space = evaluation.open_feature_space(
        options.space, weights=options.weights, device=device, batch_size=options.batch_size
    )
    evaluation.match_classes(source.classes, space, options.class_ids)
    if kind == "pipeline":
        images, labels = evaluation.sample_generated(
            options.generated,
            source,
            num_images=options.num_images,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            scheduler=options.scheduler,
            seed=options.seed,
            batch_size=options.batch_size,
            device=device,
        )
    result = evaluation.evaluate_images(images, labels, source, space, options.class_ids)
    return {"generated": options.generated, "data": options.data.source, **result}


def _device(name: str | None) -> str:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` must be one of this machine, got {name!r}") from error
    return name


def _table(result: dict[str, Any]) -> str:
    rows = [
        ("", "images", "class accuracy", "Frechet distance"),
        (
            result["generated"],
            str(result["num_images"]),
            f"{result['class_accuracy']:.4f}",
            f"{result['frechet_distance']:.3f}",
        ),
        (
            f"{result['data']} (real)",
            str(result["num_source_images"]),
            f"{result['source_accuracy']:.4f}",
            "0",
        ),
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {a:>6}  {b:>14}  {c:>16}" for name, a, b, c in rows]
    return "\n".join([*lines, "", f"features: {result['description']}"])


if __name__ == "__main__":
    sys.exit(main())
