"""How pixels become a network's input: x = (pixel - mean) / std, and the conventions that networks are trained with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lwdf.activations.images import F32

ESTIMATED_REACH = 3.0  # deviations around the mean that an input of estimated normalization is given
ESTIMATED, STANDARD = "estimated", "zero mean, unit deviation"  # mean and deviation are known, black and white are not
GIVEN, GIVEN_RANGE = "given", "given range"  # by mean and std, or by where the values end
SCENES_MEAN, SCENES_DEVIATION = 127.5, 78.0  # of the synthetic pixels; measured 131 and 78

# Deviations that a dataset's pixels may have, in shares of the largest one with that mean: MNIST's have 0.92, photographs 0.5.
FLATTEST, STARKEST = 0.2, 0.95


@dataclass(frozen=True, slots=True)
class Normalization:
    """x = (pixel - mean) / std, pixels on the 0..255 scale; one value per channel, or one for all."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: F32) -> F32:
        """Images in [0, 1] [N, C, ...] to the model's scale."""
        shape = (1, -1, *(1,) * (images.ndim - 2))
        mean, std = np.array(self.mean, np.float32).reshape(shape), np.array(self.std, np.float32).reshape(shape)
        return np.asarray((images * np.float32(255) - mean) / std, np.float32)

    def like_dataset(self, images: F32) -> F32:
        """Synthetic images in [0, 1] [N, C, ...], with the mean and deviation of the dataset's pixels where these are known.

        Numbers that the user gives are those, as a rule; a network whose BatchNormalization is folded has nothing else to say
        how bright its images are. They are not where no pixels have them: 0 and 255, 127.5 and 127.5, 104 and 1.
        """
        mean, std = np.array(self.mean), np.array(self.std)
        most = np.sqrt(np.maximum(mean * (255 - mean), 0))  # the deviation of pixels that are black or white
        if self.name != GIVEN or not ((std > FLATTEST * most) & (std < STARKEST * most)).all():
            return images
        shape = (1, -1, *(1,) * (images.ndim - 2))
        factor, center = (std / SCENES_DEVIATION).reshape(shape), (mean / 255).reshape(shape)
        return np.clip((images - SCENES_MEAN / 255) * factor + center, 0, 1).astype(np.float32)

    @property
    def apart(self) -> bool:
        """Whether channels are normalized differently."""
        return len(set(zip(self.mean, self.std, strict=True))) > 1

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that a pixel can become; generous where it is estimated."""
        if self.name in (ESTIMATED, STANDARD):
            return self._estimated_range()
        low = min(-m / s for m, s in zip(self.mean, self.std, strict=True))
        return low, max((255 - m) / s for m, s in zip(self.mean, self.std, strict=True))

    def _estimated_range(self) -> tuple[float, float]:
        centers = [(SCENES_MEAN - m) / s for m, s in zip(self.mean, self.std, strict=True)]
        reach = ESTIMATED_REACH * max(SCENES_DEVIATION / s for s in self.std)
        return min(centers) - reach, max(centers) + reach


AS_BYTES = Normalization("zero to 255", (0.0,), (1.0,))
AS_SIGNED_BYTES = Normalization("minus 128 to 127", (128.0,), (1.0,))
CONVENTIONS: tuple[Normalization, ...] = (
    Normalization("torchvision", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    Normalization("minus one to one", (127.5,), (127.5,)),
    Normalization("zero to one", (0.0,), (255.0,)),
    AS_BYTES,
    Normalization("caffe BGR", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0)),
)
ASSUMED = CONVENTIONS[0]
ASSUMED_GREY = Normalization(STANDARD, (SCENES_MEAN,), (SCENES_DEVIATION,))
