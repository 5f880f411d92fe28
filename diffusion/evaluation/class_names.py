"""Class names that say which of a model's classes they are."""

import re
from collections.abc import Sequence


def imagenet_ranks(classes: Sequence[str], num_classes: int = 1000) -> list[int] | None:
    """ImageNet's numbers of WordNet ids such as ``n01440764``, by which its folders are named.

    A class's number is the rank of its id among those of all classes.

    Args:
        classes: names, in any order.
        num_classes: how many there are; ranks among fewer would be other classes.

    Returns:
        A number for each name; None for other names, or not all of them.
    """
    if len(set(classes)) != num_classes or not all(re.fullmatch(r"n\d{8}", n) for n in classes):
        return None
    rank = {name: index for index, name in enumerate(sorted(classes))}
    return [rank[name] for name in classes]
