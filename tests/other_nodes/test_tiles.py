"""MoMA beside packs that work on tiles, crops and single steps: their own code, where it can be fetched."""

import asyncio
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import comfy.taesd.taesd
import comfy_extras.nodes_custom_sampler
import comfy_extras.nodes_upscale_model
import numpy as np
import pytest
import torch
from comfy.sd import VAE
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_mask import LatentCompositeMasked
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Window
from comfyui_moma.moma_modules.sampling.wrappers import patched
from compat_rows import message
from peers import peer_folder, peer_pack

import nodes
from workbench.scene import moma, negative, positive, tiny_shortcut, tiny_subject
from workbench.tiny_models import seeded, seeded_weight

SIDE, TILE = 128, 64
NEEDED_BY_IMPACT = ("cv2", "skimage", "piexif", "segment_anything", "dill")
SAMPLING = {"steps": 2, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform"}


@pytest.fixture(scope="module")
def vae() -> Any:
    shapes = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    return VAE(sd={name: seeded_weight(91, name, tuple(weight.shape)) for name, weight in shapes.items()})


@pytest.fixture
def subject(adapter: Any, request: pytest.FixtureRequest) -> Any:
    """One of its own for each test, with a log of its own."""
    return tiny_subject(adapter)


def top_right(size: int) -> torch.Tensor:
    region = torch.zeros(1, size, size)
    region[:, : size // 2, size // 2 :] = 1.0
    return region


def in_region(full: Any, adapter: Any, subject: Any, region: torch.Tensor) -> Any:
    part = ImageTokens(1.0, Window(region=region))
    shortcut = tiny_shortcut(region=region)
    return patched(full, settings_of(full).with_subject(subject, adapter, image_tokens=part, shortcut=shortcut))


def masked(subject: Any) -> list:
    """The prompt with the subject in the top right quarter, a prompt without it everywhere."""
    inside = nodes.ConditioningSetMask().append(positive(subject), top_right(SIDE), "default", 1.0)[0]
    return [*inside, *positive()]


def quarters(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """The largest difference of two pictures [1, C, H, W] in each quarter, row by row, apart from a border."""
    difference = (one - other).abs().amax(dim=(0, 1))
    side, border = difference.shape[-1] // 2, difference.shape[-1] // 16
    inner = slice(border, side - border)
    halves = [half for row in difference.split(side) for half in row.split(side, dim=1)]
    return [float(half[inner, inner].max()) for half in halves]


def picture() -> torch.Tensor:
    return seeded(1, "picture", (1, SIDE, SIDE, 3)).sigmoid()


@pytest.fixture(scope="module")
def upscale() -> ModuleType:
    # The pack forgets what it was the first to import.
    assert comfy_extras.nodes_custom_sampler and comfy_extras.nodes_upscale_model
    try:
        return peer_pack("ssitu", "ComfyUI_UltimateSDUpscale")
    except OSError as error:
        pytest.skip(f"its script cannot be fetched: {error}")


def upscaled(pack: ModuleType, model: Any, plus: list, vae: Any, batch_size: int = 1) -> torch.Tensor:
    """Ultimate SD Upscale (No Upscale) over four tiles [1, 3, H, W]."""
    node = pack.NODE_CLASS_MAPPINGS["UltimateSDUpscaleNoUpscale"]()
    tiles = {"mode_type": "Linear", "tile_width": TILE, "tile_height": TILE, "mask_blur": 0, "tile_padding": 0}
    seams = {"seam_fix_mode": "None", "seam_fix_denoise": 1.0, "seam_fix_mask_blur": 0}
    seams |= {"seam_fix_width": 8, "seam_fix_padding": 0, "force_uniform_tiles": True, "tiled_decode": False}
    with torch.inference_mode():
        return node.upscale(
            picture(), model, plus, negative(), vae, 1, **SAMPLING, denoise=0.6, **tiles, **seams, batch_size=batch_size
        )[0].movedim(3, 1)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("MoMA")]


def test_ultimate_sd_upscale(
    upscale: ModuleType,
    model: Any,
    adapter: Any,
    full: Any,
    subject: Any,
    vae: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a region of the picture the subject is in its tile; without one in none, and one warning says so."""
    plain = upscaled(upscale, model, positive(subject), vae)
    with caplog.at_level(logging.WARNING, "comfyui_moma"):
        assert torch.equal(upscaled(upscale, full, positive(subject), vae), plain)
    (warning,) = said(caplog)
    assert message("UltimateSDUpscale") in warning and "region_mask" in warning
    caplog.clear()
    region = in_region(full, adapter, subject, top_right(32))
    differences = quarters(upscaled(upscale, region, positive(subject), vae), plain)
    assert differences[1] > 0.1 and max(differences[0], differences[2]) < 0.02 and not said(caplog)


def test_ultimate_sd_upscale_crops_the_mask_of_a_prompt(
    upscale: ModuleType, model: Any, full: Any, subject: Any, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Conditioning (Set Mask) places the subject as well; in a batch of tiles nothing does."""
    plain = upscaled(upscale, model, masked(subject), vae)
    differences = quarters(upscaled(upscale, full, masked(subject), vae), plain)
    assert differences[1] > 0.1 and max(differences[0], differences[2]) < 0.02 and not said(caplog)
    four = [upscaled(upscale, candidate, masked(subject), vae, batch_size=4) for candidate in (model, full)]
    assert torch.equal(*four) and "Set its batch_size to 1" in said(caplog)[0]


@pytest.fixture(scope="module")
def tiled() -> Any:
    return peer_pack("BlenderNeko", "ComfyUI_TiledKSampler").nodes


def tiled_sample(pack: Any, model: Any, plus: list, strategy: str) -> torch.Tensor:
    """Tiled KSampler over four tiles [1, 4, h, w], executed as the node of that class."""
    node = pack.TiledKSampler()
    latent = {"samples": 0.3 * seeded(2, "latent", (1, 4, SIDE // 8, SIDE // 8))}
    with torch.inference_mode():
        return node.sample(
            model,
            1,
            TILE,
            TILE,
            strategy,
            **SAMPLING,
            positive=plus,
            negative=negative(),
            latent_image=latent,
            denoise=0.5,
        )[0]["samples"]


@pytest.mark.parametrize("strategy", ["simple", "random", "padded"])
def test_tiled_ksampler(
    tiled: Any,
    model: Any,
    full: Any,
    subject: Any,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It tells nothing but the areas of prompts: without one the subject is in no tile, and one warning says so."""
    node = (("prompt", strategy, 0), "BNK_TiledKSampler")
    monkeypatch.setattr("comfyui_moma.moma_modules.sampling.placing.executing_node", lambda: node)
    plain = tiled_sample(tiled, model, positive(subject), strategy)
    with caplog.at_level(logging.WARNING, "comfyui_moma"):
        assert torch.equal(tiled_sample(tiled, full, positive(subject), strategy), plain)
    (warning,) = said(caplog)
    assert (
        message("Tiled KSampler (BlenderNeko)") in warning
        and "or (Set Area) where the node does not take masks" in warning
    )


def test_tiled_ksampler_crops_the_area_of_a_prompt(
    tiled: Any, model: Any, full: Any, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subject is in the tile of its area and exactly nowhere else."""
    node = (("prompt", "area", 0), "BNK_TiledKSampler")
    monkeypatch.setattr("comfyui_moma.moma_modules.sampling.placing.executing_node", lambda: node)

    def run(candidate: Any) -> torch.Tensor:
        inside = nodes.ConditioningSetArea().append(positive(subject), TILE, TILE, TILE, 0, 1.0)[0]
        return tiled_sample(tiled, candidate, [*inside, *positive()], "simple")

    differences = quarters(run(full), run(model))
    assert differences[1] > 0.05 and max(differences[0], differences[2], differences[3]) == 0


@pytest.fixture(scope="module")
def impact() -> Iterator[Any]:
    """The pack's modules, which need a server at import."""
    for name in NEEDED_BY_IMPACT:
        pytest.importorskip(name)
    # Older ComfyUI can import it in a running server only.
    server = pytest.importorskip("server", exc_type=ImportError)
    folder = peer_folder("ltdrdata", "ComfyUI-Impact-Pack")
    sys.path.append(str(folder / "modules"))
    loop = asyncio.new_event_loop()
    server.PromptServer(loop)  # for its routes; no client ever connects
    try:
        importlib.import_module("impact.impact_server")
        nodes.NODE_CLASS_MAPPINGS.setdefault("LatentCompositeMasked", LatentCompositeMasked)  # as ComfyUI at its start
        yield importlib.import_module("impact.impact_pack")
    finally:
        del server.PromptServer.instance
        loop.close()


def detailed(impact: Any, model: Any, plus: list, vae: Any) -> torch.Tensor:
    """DetailerForEach over the top left and the top right quarter [1, 3, H, W]."""
    crops = [(0, 0, TILE, TILE), (TILE, 0, SIDE, TILE)]
    segs = [impact.SEG(None, np.ones((TILE, TILE), np.float32), 1.0, crop, crop, "thing", None) for crop in crops]
    with torch.inference_mode():
        return impact.DetailerForEach.do_detail(
            picture(),
            ((SIDE, SIDE), segs),
            model,
            None,
            vae,
            TILE,
            True,
            512,
            1,
            **SAMPLING,
            positive=plus,
            negative=negative(),
            denoise=0.5,
            feather=0,
            noise_mask=True,
            force_inpaint=True,
        )[0].movedim(3, 1)


def test_impact_detailer(
    impact: Any, model: Any, adapter: Any, full: Any, subject: Any, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In every crop, and a warning says so; where the mask of the prompt is, in that crop alone."""
    plain = detailed(impact, model, positive(subject), vae)
    with caplog.at_level(logging.WARNING, "comfyui_moma"):
        everywhere = quarters(detailed(impact, full, positive(subject), vae), plain)
    assert min(everywhere[:2]) > 0.05 and max(everywhere[2:]) == 0
    (warning,) = said(caplog)
    assert message("Impact detailers") in warning and "Conditioning (Set Mask)" in warning
    caplog.clear()
    plain, ours = (detailed(impact, candidate, masked(subject), vae) for candidate in (model, full))
    differences = quarters(ours, plain)
    assert differences[1] > 0.05 and differences[0] == 0 and not said(caplog)


def regional(impact: Any, full: Any, subject: Any, context: Any) -> list[float]:
    """RegionalSampler, one region: of every forward the smallest factor of the shortcut."""
    special = importlib.import_module("impact.special_samplers")
    seen: list[float] = []
    slot = full.model_options["transformer_options"]["patches_replace"]["attn1"][("input", 1)]
    original = slot.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> torch.Tensor:
        seen.append(float(forward.self_factors[0].min()))
        return original(out, q, k, forward, extra_options)

    slot.add_subjects = add_subjects
    wrapper = special.KSamplerAdvancedWrapper(full, 7.5, "euler", "normal", positive(subject), negative())
    prompts = special.RegionalPrompt().doit(top_right(64), wrapper)[0]
    with torch.inference_mode(), context:
        special.RegionalSampler.doit(
            1,
            0,
            "ignore",
            4,
            1,
            1.0,
            {"samples": torch.zeros(1, 4, 8, 8)},
            wrapper,
            prompts,
            0,
            True,
            "DISABLE",
            "AUTO",
            0.3,
        )
    return seen


def test_impact_regional_sampler(impact: Any, model: Any, adapter: Any, subject: Any) -> None:
    """It samples step by step, each a run: all but the first have the mask of the one before."""
    full = moma(model, adapter, subject, shortcut=tiny_shortcut(start=0.0))
    seen = regional(impact, full, subject, CurrentNodeContext("prompt", "regional", 0))
    assert len(seen) == 1 + 2 * 3 and seen[0] == 1.0 and max(seen[1:]) == 0.0
    assert max(regional(impact, full, subject, nullcontext())) == 1.0
