"""Pictures of several models side by side."""

from pathlib import Path

from torch import Tensor


def draw_rows(rows: dict[str, Tensor], file: Path) -> None:
    """Writes one row of images a model as a PNG, what starts from the same noise in one column.

    Args:
        rows: title -> uint8 ``(N, 3, H, W)``.
        file: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns, len(rows) * 1.15),
        layout="constrained",
        squeeze=False,
    )
    for (title, images), line in zip(rows.items(), axes, strict=True):
        # Out of the layout, in which a long title would widen its column.
        line[0].set_title(title, loc="left", fontsize=9).set_in_layout(False)
        for axis in line:
            axis.axis("off")
        for image, axis in zip(images, line, strict=False):
            axis.imshow(image.permute(1, 2, 0))
    figure.savefig(file, dpi=110)
    plt.close(figure)
