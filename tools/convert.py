"""`lintra convert`: checkpoints of other projects as folders that timm or diffusers open."""

import argparse
import sys
from collections.abc import Callable, Sequence


def _official_backbone(options: argparse.Namespace) -> str:
    from lintra.vision.conversion import convert_official

    if options.model is None:
        raise ValueError(f"`--model` must be given for --from {options.source}, got none")
    sizes = {} if options.img_size is None else {"img_size": options.img_size}
    report = convert_official(
        options.checkpoint,
        options.model,
        options.output,
        method=options.source,
        prefer_ema=not options.no_ema,
        **sizes,
    )
    return f"{report}\nopen with timm.create_model('local-dir:{options.output}', pretrained=True)"


def _official_dit(options: argparse.Namespace) -> str:
    from lintra.diffusion.conversion import convert_official_dit

    student = (
        {} if options.num_linear_heads is None else {"num_linear_heads": options.num_linear_heads}
    )
    report = convert_official_dit(
        options.checkpoint,
        options.output,
        to=options.to,
        policy=options.inherit,
        form=options.form,
        vae=options.vae,
        id2label=options.labels,
        model=options.model,
        image_size=options.img_size,
        num_heads=options.num_heads,
        num_classes=options.num_classes,
        prefer_ema=not options.no_ema,
        **student,
    )
    return f"{report}\nopen with lintra.diffusion.load_pipeline('{options.output}')"


def _official_clear(options: argparse.Namespace) -> str:
    from lintra.diffusion.clear_conversion import convert_clear

    if options.base is None:
        raise ValueError(f"`--base` must be given for --from {options.source}, got none")
    report = convert_clear(
        options.checkpoint,
        options.output,
        base=options.base,
        radius=options.radius,
        down_factor=options.down_factor,
    )
    return f"{report}\nopen with lintra.diffusion.load_pipeline('{options.output}')"


_BACKBONE = ("model", "no_ema", "img_size")
_DIT = ("to", "inherit", "num_linear_heads", "form", "vae", "labels", "num_heads", "num_classes")
_CLEAR = ("base", "radius", "down_factor")
# Name of a source -> what converts it and returns the text to print, and the options it reads.
SOURCES: dict[str, tuple[Callable[[argparse.Namespace], str], tuple[str, ...]]] = {
    "slab": (_official_backbone, _BACKBONE),
    "inline": (_official_backbone, _BACKBONE),
    "dit": (_official_dit, (*_BACKBONE, *_DIT)),
    "clear": (_official_clear, _CLEAR),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lintra convert", description=__doc__)
    parser.add_argument("checkpoint", help="file of the authors")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES)
    parser.add_argument("--model", help="architecture, e.g. deit_tiny_slab_patch16_224 or DiT-XL/2")
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights")
    parser.add_argument(
        "--img-size", type=int, help="resample position tables to this size; dit: expect it"
    )
    dit = parser.add_argument_group("dit")
    dit.add_argument("--to", default="dit", help="dit, or lit for a student")
    dit.add_argument("--inherit", default="all_but_attention", help="what a LiT takes, a policy")
    dit.add_argument("--num-linear-heads", type=int, help="heads of a LiT")
    dit.add_argument(
        "--form", default="official", help="official, or diffusers for its own numbers"
    )
    dit.add_argument("--vae", help="folder of the AutoencoderKL, or of a pipeline that has it")
    dit.add_argument("--labels", help="JSON file of class names by number; default: ImageNet's")
    dit.add_argument("--num-heads", type=int, help="heads, if not of size S, B, L or XL")
    dit.add_argument("--num-classes", type=int, help="classes, without the one for none")
    clear = parser.add_argument_group("clear")
    clear.add_argument("--base", help="folder of the stock FLUX pipeline")
    clear.add_argument("--radius", type=float, help="if the name of the file does not tell it")
    clear.add_argument("--down-factor", type=int, help="expect pooling kernels of this size")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for wrong arguments or a checkpoint that does not fit."""
    parser = _parser()
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    convert, reads = SOURCES[options.source]
    try:
        for name in (*_BACKBONE, *_DIT, *_CLEAR):
            value = getattr(options, name)
            if name not in reads and value != parser.get_default(name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"`{flag}` must not be given for --from {options.source}, got {value}"
                )
        print(convert(options))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
