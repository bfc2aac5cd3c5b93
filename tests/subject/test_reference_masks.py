"""Masks and pictures as people have them: where the subject is taken to be, and what is said of it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_compositing import JoinImageWithAlpha
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.subject.reference_image import References, prepare_references
from comfyui_moma.moma_modules.subject.reference_mask import RELEASED, cut_mask
from comfyui_moma.nodes.extract import ExtractSubject
from PIL import Image, ImageFilter

from workbench import ROOT
from workbench.scene import tiny_adapter

DATA = ROOT / "tests" / "data"
SIDE = 256


def released(mask: np.ndarray) -> np.ndarray:
    """The released rule for a mask [h, w] uint8."""
    return np.asarray(Image.fromarray(mask).resize((512, 512), Image.Resampling.BILINEAR)) > 0


def disc(side: int = SIDE, radius: float = 0.3) -> np.ndarray:
    """[side, side] bool: a disc around the middle, a little above it."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    return (x - 0.5) ** 2 + (y - 0.45) ** 2 < radius**2


def blurred(hard: np.ndarray, sigma: float) -> np.ndarray:
    """A hard mask with soft edges, 0..1."""
    image = Image.fromarray(hard.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(image, np.float32) / 255


def jpeg(hard: np.ndarray, quality: int) -> np.ndarray:
    """A hard mask as a JPEG file brings it back, 0..1."""
    file = io.BytesIO()
    Image.fromarray(hard.astype(np.uint8) * 255).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def noise(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, (SIDE, SIDE)).astype(np.float32)


def photo(count: int = 1, side: int = SIDE) -> torch.Tensor:
    """Pictures [count, side, side, 3] full of content."""
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def prepare(mask: Any, image: torch.Tensor | None = None, **changes: Any) -> References:
    return prepare_references(
        photo() if image is None else image, None if mask is None else torch.as_tensor(mask), **changes
    )


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("value", [1, 153, 255])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (3, 2), (16, 16), (64, 90), (512, 512), (700, 513), (2048, 1500), (3000, 3)]
)
@pytest.mark.parametrize("threshold", [RELEASED, 0.5, 1.0])
def test_hard_masks_are_cut_as_the_released_code_does(size: tuple[int, int], value: int, threshold: float) -> None:
    """To the bit, whatever the size, the value and the threshold; patches and single pixels."""
    chance = np.random.default_rng(1)
    patches = np.kron(chance.random((size[0] // 8 + 1, size[1] // 8 + 1)) < 0.4, np.ones((8, 8), bool))
    inside = patches[: size[0], : size[1]] | (chance.random(size) < 0.001)
    inside[0, 0] = True
    mask = inside.astype(np.uint8) * value
    cut = cut_mask(torch.from_numpy(mask.astype(np.float32) / 255), threshold)
    assert np.array_equal(released(cut.stencil), released(mask))
    assert cut.soft == 0


def test_threshold_0_is_the_released_rule_for_every_mask() -> None:
    mask = (blurred(disc(), 20) * 255).round().astype(np.uint8) | np.random.default_rng(0).integers(
        0, 2, (SIDE, SIDE), np.uint8
    )
    found = prepare(mask[None].astype(np.float32) / 255, threshold=RELEASED)
    assert agreement(found.masks[0].numpy(), released(mask)) == 1
    assert not any("soft" in note for note in found.notes)


SOFT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "matte with a grey background": lambda hard: (blurred(hard, 3) * 0.95 + noise(0.004, 0.05)).clip(0, 1),
    "sigmoid": lambda hard: 1 / (1 + np.exp(8 - 16 * blurred(hard, 3))) * 0.96 + noise(0, 0.04),
    "JPEG 10": lambda hard: jpeg(hard, 10),
    "JPEG 30": lambda hard: jpeg(hard, 30),
    "JPEG 90": lambda hard: jpeg(hard, 90),
    "antialiased": lambda hard: blurred(hard, 0.7),
    "feathered": lambda hard: blurred(hard, 10),
    "at most 0.6": lambda hard: blurred(hard, 2) * 0.6,
    "at most 0.3 over 0.05": lambda hard: blurred(hard, 2) * 0.25 + 0.05,
    "grey background": lambda hard: blurred(hard, 2) * 0.6 + 0.3,
    "two greys": lambda hard: np.where(hard, 0.9, 0.02),
    "0 to 255": lambda hard: blurred(hard, 2) * 255,
    "divided by 255 twice": lambda hard: blurred(hard, 2) / 255,
    "-1 to 1": lambda hard: blurred(hard, 2) * 2 - 1,
    "resized, with overshoot": lambda hard: blurred(hard, 2) * 1.1 - 0.05,
    "one bright pixel": lambda hard: np.where(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) == 0, 1, hard * 0.4),
}


@pytest.mark.parametrize("kind", SOFT)
def test_the_subject_of_a_soft_mask(kind: str) -> None:
    """It agrees with the hard mask that the soft one was made of, up to a pixel at the edge."""
    mask = SOFT[kind](disc()).astype(np.float32)
    found = prepare(mask[None]).masks[0].numpy()
    assert agreement(found, released(disc().astype(np.uint8) * 255)) > 0.96
    as_half_of_it = prepare(mask[None] if mask.max() > 1 else mask[None] * 0.5).masks[0].numpy()
    assert agreement(found, as_half_of_it) > 0.98


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7])
def test_the_threshold_moves_the_cut(level: float) -> None:
    ramp = torch.linspace(0, 1, 512).expand(1, 512, 512)
    inside = prepare(ramp, photo(side=512), threshold=level).masks.float().mean()
    assert abs(float(inside) - (1 - level)) < 0.04


def test_the_cut_lies_between_the_levels_of_background_and_subject() -> None:
    for kind, level in (("grey background", 0.6), ("at most 0.3 over 0.05", 0.175), ("0 to 255", 127.5)):
        assert cut_mask(torch.from_numpy(SOFT[kind](disc()).astype(np.float32))).level == pytest.approx(level, rel=0.02)


def test_a_mask_without_background_takes_the_whole_picture() -> None:
    for mask in (np.full((8, 8), 0.4), noise(0.9, 1.0), jpeg(np.ones((64, 64), bool), 20)):
        assert bool(prepare(mask[None].astype(np.float32)).masks.all())


def test_thin_soft_lines_stay_and_broad_shadows_go() -> None:
    """A hair between two rows of pixels is nowhere at half; a shadow of the same grey is no subject."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[60:120, 60:120] = 1
    mask[90:92, 120:] = 0.35
    mask[150:200, 60:120] = 0.35
    inside = cut_mask(torch.from_numpy(mask)).stencil > 0
    assert inside[90:92, 120:].all() and inside[60:120, 60:120].all()
    assert inside.sum() == 60 * 60 + 2 * (SIDE - 120)


def test_a_wide_shadow_does_not_outweigh_a_small_subject() -> None:
    small = disc(radius=0.06)
    mask = np.where(small, 1, np.where(np.arange(SIDE) < SIDE // 2, 0.3, 0)).astype(np.float32)
    assert np.array_equal(cut_mask(torch.from_numpy(mask)).stencil > 0, small)


def test_what_is_said_of_a_mask() -> None:
    def notes(mask: Any, **changes: Any) -> str:
        return " ".join(prepare(np.asarray(mask, np.float32)[None], **changes).notes)

    hard = disc().astype(np.float32)
    assert notes(hard) == ""
    matte = notes(SOFT["matte with a grey background"](disc()))
    assert "The mask is soft: it is cut at 0.5; 72% of it is fainter and left out (mask_threshold)." in matte
    assert notes(jpeg(disc(), 100)) == notes(blurred(disc(), 0.3)) == ""
    faint = notes(noise(0.001, 0.05))
    assert "The mask is faint, its highest value is 0.05: if nothing was found" in faint
    inverted = notes(1 - hard)
    assert "covers the picture's border and leaves out a part inside" in inverted and "Invert Mask" in inverted
    assert notes(np.ones((8, 8))) == ""
    assert "The mask (256x128) has another shape than the picture (256x256)" in notes(hard[:128])
    assert notes(hard[::2, ::2]) == ""


def test_one_mask_for_all_pictures_and_several_for_one() -> None:
    masks = torch.zeros(3, 64, 64)
    for i in range(3):
        masks[i, 10:50, 10 + 10 * i : 20 + 10 * i] = 1
    found = prepare(masks[:1], photo(3))
    assert found.notes == ("The one mask is used for each of the 3 pictures.",)
    for i in range(3):
        alone = prepare(masks[:1], photo(3)[i : i + 1])
        assert torch.equal(found.masks[i], alone.masks[0]) and torch.equal(found.images[i], alone.images[0])
    together = prepare(masks)
    assert together.notes == ("The subject is what the 3 masks mark together.",)
    assert torch.equal(together.masks, prepare(masks.amax(dim=0)).masks)
    with pytest.raises(ValueError, match=r"^mask holds 2 masks, image 3 pictures; connect one mask for each picture, "):
        prepare(masks[:2], photo(3))
    masks[1] = 1 - masks[1]
    (note,) = prepare(masks, photo(3)).notes
    assert note.startswith("Picture 2: The mask covers the picture's border")
    masks[0] = masks[1]
    (note,) = prepare(masks, photo(3)).notes
    assert note.startswith("Picture 1, 2: The mask covers")
    both = prepare(masks[:1], photo(2)).notes
    assert [note[:16] for note in both] == ["The one mask is ", "The mask covers "]


def load_image(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What ComfyUI's Load Image gives for a file."""
    import nodes

    monkeypatch.setattr(folder_paths, "input_directory", str(path.parent))
    return nodes.LoadImage().load_image(path.name)


def test_both_meanings_of_transparency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transparent on the subject (Join Image with Alpha) and around it (a cut-out): the subject is the same."""
    image, mask = photo(), torch.from_numpy(disc().astype(np.float32))[None]
    wanted = prepare(mask).masks
    (joined,) = JoinImageWithAlpha.execute(image, mask).args
    from_joined = prepare(None, joined)
    assert torch.equal(from_joined.masks, wanted)
    assert "The subject is the picture's transparent part: what is opaque lies around it." in from_joined.notes[0]
    assert "the other way round, connect a mask" in from_joined.notes[0]
    (cut_out,) = JoinImageWithAlpha.execute(image * mask[..., None], 1 - mask).args
    from_cut_out = prepare(None, cut_out)
    assert torch.equal(from_cut_out.masks, wanted)
    assert "The subject is the picture's opaque part, as in a cut-out." in from_cut_out.notes[0]

    # Through a file and Load Image, IMAGE and MASK come apart; joined again they are that file.
    pixels = (cut_out[0] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels, "RGBA").save(tmp_path / "cut_out.png")
    loaded, background = load_image(tmp_path / "cut_out.png", monkeypatch)
    (again,) = JoinImageWithAlpha.execute(loaded, background).args
    assert torch.equal(prepare(None, again).masks, wanted)
    assert torch.equal(prepare(1 - background, loaded).masks, wanted)
    with pytest.raises(ValueError, match="^image is black where its mask marks the subject. If the picture is a cut-o"):
        prepare(background, loaded)
    (kept,) = JoinImageWithAlpha.execute(image, 1 - mask).args  # a cut-out whose file kept the background's colours
    assert "covers the picture's border" in prepare(1 - mask, kept).notes[0]


def test_a_connected_mask_beats_transparency() -> None:
    image, mask = photo(), torch.from_numpy(disc().astype(np.float32))[None]
    (joined,) = JoinImageWithAlpha.execute(image, mask).args
    small = torch.from_numpy(disc(radius=0.1).astype(np.float32))[None]
    found = prepare(small, joined)
    assert torch.equal(found.masks, prepare(small).masks) and torch.equal(found.images, prepare(small).images)
    assert found.notes == ("The picture's transparency is not used, since a mask is connected.",)


def test_transparency_that_says_nothing() -> None:
    opaque = torch.cat([photo(), torch.ones(1, SIDE, SIDE, 1)], dim=3)
    whole = prepare(None, opaque)
    assert bool(whole.masks.all()) and whole.notes == ()
    with pytest.raises(ValueError, match="^image is fully transparent: nothing says where the subject is. Connect its"):
        prepare(None, torch.cat([photo(), torch.zeros(1, SIDE, SIDE, 1)], dim=3))
    grey = torch.cat([photo()[..., :1], torch.from_numpy(1.0 - disc())[None, ..., None].float()], dim=3)
    assert "transparent part" in prepare(None, grey).notes[0]


def test_a_subject_that_is_black_is_refused() -> None:
    """As it is saved by a mask editor that loses the colours under the paint; its soft edge keeps them."""
    mask = torch.from_numpy(blurred(disc(), 1.5))[None]
    image = torch.where(mask[..., None] == 1, torch.zeros(()), photo())
    message = (
        r"^image is black where its mask marks the subject\. If you painted the mask in the mask editor.*"
        r"second Load Image, take `image` from that one and `mask` from the painted one"
    )
    with pytest.raises(ValueError, match=message):
        prepare(mask, image)
    with pytest.raises(ValueError, match=r"marks the subject for picture 2 of 2\."):
        prepare(mask, torch.cat([photo(), image]))
    with pytest.raises(ValueError, match=r"^image is black\. Look at the node that it comes from\."):
        prepare(None, torch.zeros(1, SIDE, SIDE, 3))
    alpha = 1 - mask[..., None]
    with pytest.raises(ValueError, match=r"^image is black where its transparency marks the subject\. Connect a mask"):
        prepare(None, torch.cat([image, alpha], dim=3))
    # Resized together with its mask, and a mask of another size.
    half = [torch.nn.functional.avg_pool2d(t, 2) for t in (image.movedim(-1, 1), mask[:, None])]
    with pytest.raises(ValueError, match="^image is black where"):
        prepare(half[1][:, 0], half[0].movedim(1, -1))
    with pytest.raises(ValueError, match="^image is black where"):
        prepare(half[1][:, 0], image)
    # A dark photograph is none of that, nor a subject with black parts.
    assert prepare(mask, photo() * 0.1).notes[0].startswith("The mask is soft")
    surest = torch.from_numpy(np.where(disc(radius=0.1), 1, disc() * 0.7).astype(np.float32))[None]
    prepare(surest, torch.where(surest[..., None] == 1, torch.zeros(()), photo()))
    parts = photo()
    parts[:, :, : SIDE // 2] = 0
    assert prepare(mask > 0.5, parts).notes == ()


def test_a_subject_of_one_colour_is_said() -> None:
    mask = disc()[None].astype(np.float32)
    for colour in ((1.0, 1.0, 1.0), (0.2, 0.0, 0.9), (0.02, 0.02, 0.02)):
        image = photo()
        image[0, disc()] = torch.tensor(colour) + 0.01 * (photo()[0, disc()] - 0.5)
        (note,) = prepare(mask, image).notes
        text = ", ".join(str(round(value * 255)) for value in colour)
        assert note.startswith(f"The subject is of one colour (RGB {text}): the language model sees only its outline.")
    shaded = photo()
    shaded[0, disc()] = torch.linspace(0.9, 1.0, int(disc().sum()))[:, None].expand(-1, 3)
    assert prepare(mask, shaded).notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image * 255, "^image holds values from .* to .*; expected 0 to 1"),
        (lambda image: image * 2 - 1, "^image holds values from -.*; expected 0 to 1"),
        (lambda image: image.clone().index_fill_(1, torch.tensor([3]), torch.inf), "^image holds NaN or infinite"),
        (lambda image: image.clone().index_fill_(1, torch.tensor([3]), torch.nan), "^image holds NaN or infinite"),
    ],
)
def test_pictures_in_another_scale_are_refused(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(None, change(photo()))


def test_one_picture_in_another_scale_among_others_is_refused() -> None:
    with pytest.raises(ValueError, match="^image holds values from .*; expected 0 to 1"):
        prepare(None, torch.cat([photo(30), photo() * 255]))


def test_a_little_outside_of_the_scale_is_cut_off() -> None:
    image = photo() * 1.4 - 0.1
    assert torch.equal(prepare(None, image).images, prepare(None, image.clamp(0, 1)).images)


def test_the_node_speaks_before_the_language_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before its weights are read; notes are shown and kept with the preview."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    mllm = load_mllm(DATA / "mllm" / "tiny56" / "checkpoint", vision_heads=4)
    adapter = tiny_adapter(hidden=mllm.hidden_size)
    fixed = {"subject": "car", "prompt": "A car.", "fit": "squash", "cache": False}
    with pytest.raises(ValueError, match="^image is black"):
        ExtractSubject.execute(mllm, adapter, torch.zeros(1, 64, 64, 3), **fixed)
    assert "loaded" not in vars(mllm)
    matte = torch.from_numpy(SOFT["matte with a grey background"](disc()))[None]
    with torch.inference_mode():
        output, wide = (
            ExtractSubject.execute(mllm, adapter, photo(), mask=matte, mask_threshold=t, **fixed) for t in (0.5, 0.0)
        )
    assert "loaded" in vars(mllm)
    (text,) = output.ui["text"]
    assert text.startswith("The mask covers 29% of the picture.\nThe mask is soft: it is cut at 0.5;")
    assert wide.ui["text"][0].startswith("The mask covers 100% of the picture. That is nearly all")
    subject = output.args[0]
    (file,) = output.ui["images"]
    shown = np.asarray(Image.open(tmp_path / file["subfolder"] / file["filename"]).convert("RGB"))[:, -512:]
    on_white = np.where(subject.masks[0].numpy()[..., None], subject.images[0].numpy(), 255)
    assert np.array_equal(shown, on_white)
