"""ImageClassification: a task over images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradtrace.errors import DatasetError
from gradtrace.task import Example
from gradtrace.tasks.base import Classification, TensorRows
from gradtrace.tasks.payload import MODES, Pixels, check_keys, decode_image, encode_image

Statistic = float | Sequence[float]


class Normalise:
    """uint8 pixels to (pixels / 255 - mean) / std, and back. mean, std: a number, or one for each channel"""

    def __init__(self, mean: Statistic, std: Statistic) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [..., height, width, channels] -> float32 [..., channels, height, width]."""
        return pixels.movedim(-1, -3).contiguous().float().div_(255).sub_(self.mean).div_(self.std)

    def inverse(self, image: Tensor) -> Pixels:
        """float [channels, height, width] -> uint8 [height, width, channels]."""
        values = (image.cpu().float().numpy() * self.std.numpy() + self.mean.numpy()) * 255  # faster than in PyTorch
        return np.ascontiguousarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


class NormalisedImages:
    """uint8 images [rows, height, width, channels], normalised when they are read."""

    def __init__(self, pixels: Tensor, normalise: Normalise) -> None:
        self.pixels, self.normalise = pixels, normalise

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: int | Tensor) -> Tensor:
        return self.normalise(self.pixels[rows])


class ImageClassification(Classification):
    """Classify images [channels, height, width], all of one size.

    Arrays of uint8 pixels are normalised to (pixels / 255 - mean) / std. The images of a data set of (tensor, label)
    pairs, such as torchvision's, must be normalised already, by the given mean and std.

        TASK = ImageClassification(model=make_model, train=(images, labels), class_names=names, mean=0.13, std=0.31)

    Requests: {"image": base64 PNG or JPEG, or nested lists of 0 to 255; "label": number or name, optional}.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        mean: Statistic = 0.0,
        std: Statistic = 1.0,
    ) -> None:
        super().__init__(model, train, query, class_names=class_names)
        self.normalise = Normalise(mean, std)

    def rows(self, inputs: Any, labels: Any) -> TensorRows:
        images = np.asarray(inputs)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DatasetError(
                f"images are {images.dtype} {list(images.shape)}; give uint8 [rows, height, width] or "
                "[rows, height, width, channels], or a data set of (tensor, label) pairs"
            )
        pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None])
        return TensorRows(NormalisedImages(pixels, self.normalise), labels, "images")

    def parse_input(self, payload: Mapping[str, Any]) -> Tensor:
        check_keys(payload, ("image", "label"))
        channels, height, width = self.train[0][0].shape
        return self.normalise(torch.from_numpy(decode_image(payload.get("image"), height, width, channels)))

    def render(self, example: Example) -> dict[str, Any]:
        pixels = self.normalise.inverse(example[0])
        return {"image": encode_image(pixels) if pixels.shape[2] in MODES else pixels.tolist()}
