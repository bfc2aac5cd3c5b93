"""The reference picture as the language model and the UNet get it."""

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.subject.reference_image import prepare_references
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def test_squash_is_the_released_resize() -> None:
    image = torch.rand(1, 100, 60, 3)
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:20, 10:20] = 1
    reference = prepare_references(image, mask)
    pixels = Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
    assert np.array_equal(reference.images[0].numpy(), np.asarray(pixels.resize((512, 512), Image.Resampling.BILINEAR)))
    stencil = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
    expected = np.asarray(stencil.resize((512, 512), Image.Resampling.BILINEAR)) > 0
    assert np.array_equal(reference.masks[0].numpy(), expected)


def test_pad_and_crop_keep_the_aspect_ratio() -> None:
    image, mask = torch.full((1, 50, 100, 3), 0.2), torch.zeros(1, 50, 100)
    mask[..., 90:] = 1
    padded = prepare_references(image, mask, "pad")
    assert bool((padded.images[0, :100] == 255).all()) and bool((padded.images[0, 200:300] == 51).all())
    assert not padded.masks[0, :100].any() and bool(padded.masks[0, 256, 500])
    cropped = prepare_references(image, mask, "crop")
    assert bool(cropped.masks[0, :, 420:].all()) and not cropped.masks[0, :, :380].any()
    with pytest.raises(ValueError, match="fit is 'stretch'; choose one of squash, pad, crop"):
        prepare_references(image, mask, "stretch")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), st.sampled_from(["squash", "pad", "crop"]))
def test_any_picture_becomes_a_reference(height: int, width: int, channels: int, fit: str) -> None:
    reference = prepare_references(torch.ones(1, height, width, channels), None, fit)
    assert reference.images.shape == (1, 512, 512, 3) and bool(reference.masks.any())


def test_each_picture_of_a_batch_is_prepared_as_if_alone() -> None:
    images, masks = torch.rand(2, 40, 60, 3), torch.zeros(2, 40, 60)
    masks[0, :10], masks[1, 30:] = 1, 1
    both = prepare_references(images, masks, "crop")
    for i in range(2):
        alone = prepare_references(images[i], masks[i], "crop")
        assert torch.equal(both.images[i], alone.images[0]) and torch.equal(both.masks[i], alone.masks[0])
    masks[1] = 0
    with pytest.raises(ValueError, match="^mask is empty for picture 2 of 2: no pixel"):
        prepare_references(images, masks)
