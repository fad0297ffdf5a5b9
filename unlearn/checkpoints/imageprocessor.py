"""Image preprocessing from `preprocessor_config.json` with PIL and numpy: resize, crop, rescale, normalise.

    pixels[c, y, x] = (value * rescale_factor - mean[c]) / std[c],   value in 0..255

The processors of transformers that resize with PIL give the same numbers; those that need torchvision filter a little
differently and are not required here. Only processor types whose steps are exactly these are accepted: measuring a
classifier on images prepared in another way would measure another classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_HALF = (0.5, 0.5, 0.5)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SQUARE, _SHORTEST = {"height": 224, "width": 224}, {"shortest_edge": 224}
_BILINEAR, _BICUBIC = 2, 3

# What each type of processor does where its file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": _BILINEAR, "mean": _HALF, "std": _HALF},
    "Siglip": {"size": _SQUARE, "resample": _BICUBIC, "mean": _HALF, "std": _HALF},
    "Pvt": {"size": _SQUARE, "resample": _BICUBIC, "mean": _IMAGENET[0], "std": _IMAGENET[1]},
    "DeiT": {"size": {"height": 256, "width": 256}, "crop": True, "resample": _BICUBIC, "mean": _HALF, "std": _HALF},
    "Bit": {"size": _SHORTEST, "crop": True, "resample": _BICUBIC, "mean": _CLIP[0], "std": _CLIP[1]},
    "CLIP": {"size": _SHORTEST, "crop": True, "resample": _BICUBIC, "mean": _CLIP[0], "std": _CLIP[1]},
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": _BICUBIC, "mean": _HALF, "std": _HALF},
}


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Prepare one PIL image; every field is a step, None where the step is left out.

    `shortest` resizes the shorter side and keeps the proportions; `exact` resizes to (height, width); `crop` cuts
    (height, width) from the centre, with zeros around an image that is smaller.
    """

    mode: str  # "RGB" or "L"
    exact: tuple[int, int] | None
    shortest: int | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], channels: int = 3) -> ImageProcessor:
        """Read the content of `preprocessor_config.json`.

        Args:
            config: the file's content.
            channels: what the model takes, 3 (RGB) or 1 (grey).

        Raises:
            UnsupportedError: a processor type with other steps than these.
            UsageError: a size, mean or standard deviation that cannot be used.
        """
        named = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
        family = named.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
        family = family.removesuffix("FeatureExtractor")
        if family not in _DEFAULTS or config.get("do_pad") or config.get("rescale_offset") or channels not in (1, 3):
            raise UnsupportedError(
                f"expected one of {', '.join(_DEFAULTS)} as image processor, found {named or 'none named'} with "
                f"{channels} channels; pass images already prepared, or convert its configuration"
            )
        default = _DEFAULTS[family]
        try:
            exact, shortest = _size(config.get("size", default["size"]), square=family not in ("Bit", "CLIP"))
            crop = None
            if config.get("do_center_crop", default.get("crop", False)):
                crop = _size(config.get("crop_size", _SQUARE), square=True)[0]
            if family == "ConvNext":
                # One number: below 384 resize the shorter side to that / crop_pct and crop, else squash to a square.
                edge = shortest or (exact or (0,))[0]
                exact, shortest = (edge, edge), None
                if edge < 384:
                    exact, crop, shortest = None, (edge, edge), int(edge / config.get("crop_pct", 0.875))
            if not config.get("do_resize", True):
                exact = shortest = None
            normalise = config.get("do_normalize", True)
            return cls(
                mode="RGB" if channels == 3 else "L",
                exact=exact,
                shortest=shortest,
                resample=int(config.get("resample", default["resample"])),
                crop=crop,
                rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else None,
                mean=_channels(config.get("image_mean", default["mean"]), channels) if normalise else None,
                std=_channels(config.get("image_std", default["std"]), channels) if normalise else None,
            )
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                "preprocessor_config.json: expected size, crop_size, image_mean and image_std as transformers writes "
                "them, found something else; save the image processor again"
            ) from None

    def __call__(self, image: Image) -> torch.Tensor:
        """Pixels of one image.

        Returns:
            float32 tensor [channels, height, width].
        """
        import torch

        image = image.convert(self.mode)
        width, height = image.size
        target = self.exact
        if self.shortest is not None:
            long = int(self.shortest * max(width, height) / min(width, height))
            target = (long, self.shortest) if width <= height else (self.shortest, long)
        if target is not None:
            image = image.resize((target[1], target[0]), self.resample)
        pixels = np.asarray(image).reshape(image.size[1], image.size[0], -1).transpose(2, 0, 1)  # [C, H, W]
        if self.crop is not None:
            pixels = _centre_crop(pixels, *self.crop)
        values = pixels.astype(np.float64) * (1.0 if self.rescale is None else self.rescale)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(numbers).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
            values = (values - mean) / std
        return torch.from_numpy(values.astype(np.float32))


def _size(size: Any, *, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """(exact, shortest) of a size entry; a bare number means a square or the shorter side, by processor type."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if "shortest_edge" in size and "longest_edge" not in size:
        exact, shortest = None, int(size["shortest_edge"])
    else:
        exact, shortest = (int(size["height"]), int(size["width"])), None
    if min(exact or (shortest or 0,)) < 1:
        raise ValueError("size")
    return exact, shortest


def _channels(numbers: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(n) for n in numbers) if isinstance(numbers, list | tuple) else (float(numbers),) * channels
    if len(values) != channels:
        raise ValueError("channels")
    return values


def _centre_crop(pixels: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Cut [C, height, width] from the centre of [C, H, W]; a smaller image is centred on zeros, rounding down-right."""
    vertical, horizontal = (max(0, height - pixels.shape[1]), max(0, width - pixels.shape[2]))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    before = ((vertical + 1) // 2, (horizontal + 1) // 2)
    pixels = np.pad(pixels, ((0, 0), (before[0], vertical - before[0]), (before[1], horizontal - before[1])))
    top, left = max(0, top + before[0]), max(0, left + before[1])
    return pixels[:, top : top + height, left : left + width]
