"""How the models of a study are judged."""

from dataclasses import dataclass, field

from ..evaluation import check_feature_space
from ..sampling import SCHEDULERS
from ..training.config import check_field


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a trained model is judged: all from the same noise.

    Args:
        num_images: samples, balanced over the classes.
        num_inference_steps, scheduler: of the sampler, see `lintra.diffusion.sampling.SCHEDULERS`;
            none is the pipeline's own scheduler, which is what text to image has.
        guidance_scale: classifier-free guidance; 1 is none.
        batch_size: samples at once.
        seed: of the first sample's noise.
        space, weights: feature space of the Frechet distance and the classifier, see
            `open_feature_space`.
        picture_labels: classes that are shown.
        num_pictures: images of a row of the picture.
        throughput_batch: images of the forward passes whose speed is measured.
    """

    num_images: int = 5000
    num_inference_steps: int = 25
    scheduler: str | None = "dpmsolver"
    guidance_scale: float = 1.0
    batch_size: int = 1000
    seed: int = 1_000_000
    space: str = "digits"
    weights: str | None = None
    picture_labels: list[int] = field(default_factory=lambda: [*range(10)])
    num_pictures: int = 10
    throughput_batch: int = 256

    def __post_init__(self) -> None:
        known = ", ".join(SCHEDULERS)
        is_known = self.scheduler in (None, *SCHEDULERS)
        check_field(is_known, "evaluation.scheduler", f"be one of {known}", self.scheduler)
        for name in ("num_images", "num_inference_steps", "batch_size", "throughput_batch"):
            value = getattr(self, name)
            check_field(value > 1, f"evaluation.{name}", "be greater than 1", value)
        check_feature_space(self.space, self.weights)
