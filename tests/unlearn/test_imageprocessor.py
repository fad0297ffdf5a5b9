from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from probes.errors import UnlearnError, UnsupportedError, UsageError
from tests import tiny
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.checkpoints.imageprocessor import ImageProcessor


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def processor(family: str, settings: dict[str, Any]) -> Any:
    """The reference implementation with PIL, which does without torchvision."""
    name = f"transformers.models.{family.lower()}.image_processing_pil_{family.lower()}"
    return getattr(import_module(name), f"{family}ImageProcessorPil")(**settings)


@pytest.mark.parametrize(
    ("family", "settings_"),
    [
        ("ViT", {}),
        ("ViT", {"size": {"height": 20, "width": 30}, "resample": 0, "image_std": [0.1, 0.2, 0.3]}),
        ("ViT", {"do_resize": False, "do_normalize": False}),
        ("ViT", {"do_rescale": False, "size": {"shortest_edge": 24}}),
        ("DeiT", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 33, "width": 36}}),
        ("Bit", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("Bit", {"do_resize": False, "crop_size": {"height": 60, "width": 63}}),
        ("CLIP", {}),
        ("Siglip", {}),
        ("Pvt", {}),
        ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.8}),
        ("ConvNext", {}),
    ],
)
def test_images_as_the_reference_prepares_them(family: str, settings_: dict[str, Any]) -> None:
    ours = ImageProcessor.from_config({"image_processor_type": f"{family}ImageProcessor", **settings_})
    for image in (picture(50, 70), picture(71, 53)):
        expected = processor(family, settings_)(image, return_tensors="pt")["pixel_values"][0].float()
        found = ours(image)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, UnsupportedError),
        ({"image_processor_type": "LayoutLMv3ImageProcessor"}, UnsupportedError),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, UnsupportedError),
        ({"image_processor_type": "ViTImageProcessor", "size": "large"}, UsageError),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 0, "width": 2}}, UsageError),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}, UsageError),
        ({"image_processor_type": "BitImageProcessor", "crop_size": None}, UsageError),
    ],
)
def test_other_preprocessing_is_refused(config: dict[str, Any], kind: type[UnlearnError]) -> None:
    with pytest.raises(kind):
        ImageProcessor.from_config(config)


def test_old_feature_extractors() -> None:
    old = ImageProcessor.from_config({"feature_extractor_type": "ViTFeatureExtractor", "size": 24})
    assert old(picture(40, 30)).shape == (3, 24, 24)
    assert ImageProcessor.from_config(
        {"image_processor_type": "ConvNextFeatureExtractor", "size": 48, "crop_pct": 0.5}
    )(picture(40, 30)).shape == (3, 48, 48)


def test_a_saved_processor_and_other_image_modes(tmp_path: Path) -> None:
    folder = tiny.save(tiny.image_classifier("vit"), None, tmp_path / "in")
    prepare = open_checkpoint(folder).image_processor()
    expected = processor("ViT", {"size": {"height": 32, "width": 32}})
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        image = picture(40, 44, mode)
        pixels = expected(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(prepare(image), pixels, rtol=1e-5, atol=1e-6)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        open_checkpoint(folder).image_processor()


def test_grey_models() -> None:
    config = {"image_processor_type": "ViTImageProcessor", "image_mean": 0.5, "image_std": 0.5}
    assert ImageProcessor.from_config(config, 1)(picture(30, 30)).shape == (1, 224, 224)
