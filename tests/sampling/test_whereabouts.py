"""Where in the picture a run is: the map that travels with a prompt, regions on tiles, runs that follow one another."""

import logging
from typing import Any

import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from comfyui_moma.moma_modules.host import messages as editor
from comfyui_moma.moma_modules.prompt.marks import MAP_KEY, PICTURE, box_in, mark_tokens, picture_map
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Window
from comfyui_moma.moma_modules.sampling.whereabouts import FIRST, GOES_ON, PART, WHOLE, Trace, kind_of_node
from comfyui_moma.moma_modules.sampling.wrappers import patched
from torch.nn.functional import interpolate

from workbench.scene import close, moma, negative, positive, sample, tiny_shortcut, tiny_subject
from workbench.tiny_models import seeded

NODE = ("prompt", "node", 0)


def cropped(conditioning: list, canvas: tuple[int, int], box: tuple[int, int, int, int], tile: tuple[int, int]) -> list:
    """What packs do that crop reference latents: to the canvas, the box (top, bottom, left, right), to the tile."""
    top, bottom, left, right = box
    made = []
    for text, values in conditioning:
        whole = [interpolate(item, size=canvas, mode="bilinear", align_corners=False) for item in values[MAP_KEY]]
        tiles = [item[:, :, top:bottom, left:right] for item in whole]
        small = [interpolate(item, size=tile, mode="bilinear", align_corners=False) for item in tiles]
        made.append([text, {**values, MAP_KEY: small}])
    return made


@pytest.mark.parametrize("canvas", [(16, 16), (128, 96), (400, 260)])
@pytest.mark.parametrize("tile", [(8, 8), (64, 64), (40, 72)])
def test_the_map_tells_the_place_of_a_crop(subject: Any, canvas: tuple[int, int], tile: tuple[int, int]) -> None:
    """Anywhere in the picture, at its border too, to a hundredth of the picture's side."""
    high, wide = canvas
    for box in ((0, high // 2, 0, wide // 4), (high // 4, high, wide // 2, wide), (high // 3, high // 3 * 2, 0, wide)):
        found = box_in([values for _, values in cropped(positive(subject), canvas, box, tile)])
        assert found is not None
        for value, edge, side in zip(found, box, (high, high, wide, wide), strict=True):
            assert abs(value - edge / side) < 0.01
    whole = box_in([values for _, values in cropped(positive(subject), canvas, (0, high, 0, wide), tile)])
    assert whole == PICTURE


def test_a_map_that_nobody_touched_tells_nothing(subject: Any) -> None:
    assert box_in([values for _, values in positive(subject)]) is None
    assert box_in([values for _, values in positive()]) is None
    other = torch.zeros(1, 4, 8, 8)
    twice = mark_tokens([[positive()[0][0], {MAP_KEY: [other, picture_map()]}]], {subject.key: (1,)})
    assert twice[0][1][MAP_KEY][0] is other and len(twice[0][1][MAP_KEY]) == 2


def with_region(model: Any, adapter: Any, subject: Any, region: torch.Tensor) -> Any:
    settings = settings_of(moma(model, adapter, subject, shortcut=tiny_shortcut(region=region)))
    return patched(model, settings.with_subject(subject, adapter, image_tokens=ImageTokens(1.0, Window(region=region))))


@pytest.mark.parametrize("resolution", [2, 16, 512])
def test_a_region_follows_a_tile(model: Any, adapter: Any, subject: Any, resolution: int) -> None:
    """A tile of 8x8 out of 16x16: with the picture's region it is what it is with that part of the region."""
    half = torch.zeros(1, resolution, resolution)
    half[:, : resolution // 2] = 1.0
    tile = cropped(positive(subject), (16, 16), (4, 12, 8, 16), (8, 8))
    part = torch.zeros(1, 8, 8)
    part[:, :4] = 1.0
    ours = sample(with_region(model, adapter, subject, half), tile, negative())
    expected = sample(with_region(model, adapter, subject, part), positive(subject), negative())
    plain = sample(model, positive(subject), negative())
    assert close(ours, expected, 1e-5) and not close(ours, plain, 1e-2)
    away = cropped(positive(subject), (16, 16), (8, 16, 0, 8), (8, 8))
    assert torch.equal(sample(with_region(model, adapter, subject, half), away, negative()), plain)


def test_a_subject_without_a_place_stays_out_of_tiles(
    model: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    subject = tiny_subject(adapter, seed=301)
    full = moma(model, adapter, subject, shortcut=tiny_shortcut())
    plain = sample(model, positive(subject), negative())
    with caplog.at_level(logging.WARNING):
        for left in (0, 8):
            tile = cropped(positive(subject), (16, 16), (0, 8, left, left + 8), (8, 8))
            assert torch.equal(sample(full, tile, negative()), plain)
        batch = sample(with_region(model, adapter, subject, torch.ones(1, 8, 8)), tile, negative(), batch=2)
        assert torch.equal(batch, sample(model, positive(subject), negative(), batch=2))
        sample(moma(model, adapter, subject, weight=0.0), tile, negative())
    said = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
    assert len(said) == 2, "once for tiles that follow one another, and not for what is off"
    assert "works on tiles of the picture, and nothing says where in the picture the subject is" in said[0]
    assert "the subject 'car' stays out of them. Connect the mask of MoMA Subject Mask" in said[0]
    assert "in a batch it tells the place of the first one only" in said[1] and "Set its batch_size to 1" in said[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BNK_TiledKSamplerAdvanced", "tiles"),
        ("UltimateSDUpscaleNoUpscale", "tiles"),
        ("FaceDetailerPipe", "crops"),
        ("DetailerForEachDebug", "crops"),
        ("KSampler", None),
        (None, None),
    ],
)
def test_nodes_that_are_known_by_name(name: str | None, kind: str | None) -> None:
    assert kind_of_node(name) == kind


def run_as(
    monkeypatch: pytest.MonkeyPatch, name: str, model: Any, subject: Any, plus: list | None = None, **kwargs: Any
) -> torch.Tensor:
    """A run within a node of that class, as a server executes it."""
    with monkeypatch.context() as patch:
        patch.setattr("comfyui_moma.moma_modules.sampling.placing.executing_node", lambda: (NODE, name))
        return sample(model, positive(subject) if plus is None else plus, negative(), **kwargs)


def test_a_tiling_node_that_tells_nothing(
    model: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Subjects stay out, with a region or without, and where their prompt was left out; what a prompt places stays."""
    import nodes

    subject = tiny_subject(adapter, seed=302)
    plain = sample(model, positive(subject), negative())
    region = with_region(model, adapter, subject, torch.ones(1, 8, 8))
    full = moma(model, adapter, subject, shortcut=tiny_shortcut())
    with caplog.at_level(logging.WARNING):
        for patched_model in (full, region):
            assert torch.equal(run_as(monkeypatch, "BNK_TiledKSampler", patched_model, subject), plain)
            assert torch.equal(run_as(monkeypatch, "BNK_TiledKSampler", full, subject, positive()), plain)
    (said,) = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
    assert "the node BNK_TiledKSampler works on tiles of the picture, and it does not tell where they are in it" in said
    assert "give the prompt with the subject to Conditioning (Set Mask)" in said
    masked = nodes.ConditioningSetMask().append(positive(subject), torch.ones(1, 64, 64), "default", 1.0)[0]
    placed = run_as(monkeypatch, "BNK_TiledKSampler", full, subject, masked)
    assert close(placed, sample(full, positive(subject), negative()), 1e-5)
    half = with_region(model, adapter, subject, torch.cat([torch.ones(1, 4, 8), torch.zeros(1, 4, 8)], dim=1))
    assert torch.equal(run_as(monkeypatch, "BNK_TiledKSampler", half, subject, masked), placed)


def test_a_detailer(
    model: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a crop the subject acts as on a picture, and a warning says so; with a region, which is elsewhere, not."""
    subject = tiny_subject(adapter, seed=303)
    full = moma(model, adapter, subject, shortcut=tiny_shortcut())
    region = with_region(model, adapter, subject, torch.ones(1, 8, 8))
    plain = sample(model, positive(subject), negative())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(
            run_as(monkeypatch, "FaceDetailer", full, subject), sample(full, positive(subject), negative())
        )
        assert torch.equal(run_as(monkeypatch, "FaceDetailer", region, subject), plain)
        run_as(monkeypatch, "FaceDetailer", full, subject, positive())  # its wildcards forget where the subject is
    lost = "no positive prompt of this run knows where the subject 'car' is"
    assert [record for record in caplog.records if lost in record.getMessage()]
    said = [record.getMessage() for record in caplog.records if "FaceDetailer" in record.getMessage()]
    assert len(said) == 2 and "MoMA looks for the subject 'car' in each" in said[0]
    assert "a region_mask would keep it out." in said[0]
    assert "it does not tell where they are in it, which a region_mask needs: the subject 'car' stays out of" in said[1]


@pytest.mark.parametrize("name", ["FaceDetailer", "UltimateSDUpscale"])
def test_the_part_that_stays_out_is_named(
    model: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Only one of the two nodes has a region: on a crop that one is out, on a tile at a known place the other."""
    one, other = "Apply MoMA Adapter", "Self-Attn Shortcut"
    everywhere = torch.ones(1, 8, 8)
    for out_is_shortcut in (False, True):
        subject = tiny_subject(adapter, seed=306 + out_is_shortcut)
        out, acts = (other, one) if out_is_shortcut else (one, other)
        region = {out if name == "FaceDetailer" else acts: everywhere}
        settings = settings_of(moma(model, adapter, subject, shortcut=tiny_shortcut(region=region.get(other))))
        tokens = ImageTokens(1.0, Window(region=region.get(one)))
        full = patched(model, settings.with_subject(subject, adapter, image_tokens=tokens))
        plus = positive(subject)
        if name != "FaceDetailer":
            plus = cropped(plus, (16, 16), (0, 8, 8, 16), (8, 8))
        caplog.clear()
        ours = run_as(monkeypatch, name, full, subject, plus)
        (said,) = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
        assert f"what {out} adds of the subject 'car' stays out of them, while {acts} acts. " in said
        alone = moma(
            model, adapter, subject, **({} if out_is_shortcut else {"weight": None, "shortcut": tiny_shortcut()})
        )
        assert close(ours, sample(alone, positive(subject), negative()), 1e-5)


def copies(conditioning: list) -> list:
    """The CONDITIONING as a cache that writes it to a file gives it back."""
    return [[text, {**values, MAP_KEY: [item.clone() for item in values[MAP_KEY]]}] for text, values in conditioning]


def test_a_copy_of_the_map_tells_nothing_of_tiles(
    model: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a node that crops maps tells by a whole one that it works on the whole picture."""
    subject = tiny_subject(adapter, seed=308)
    full = moma(model, adapter, subject, shortcut=tiny_shortcut())
    copied, plain = copies(positive(subject)), sample(model, positive(subject), negative())
    assert box_in([values for _, values in copied]) == PICTURE
    assert torch.equal(run_as(monkeypatch, "BNK_TiledKSampler", full, subject, copied), plain)
    assert "works on tiles of the picture, and it does not tell where they are in it" in caplog.text
    caplog.clear()
    run_as(monkeypatch, "FaceDetailer", full, subject, copied)
    assert "the node FaceDetailer works on several pictures or parts of one" in caplog.text
    caplog.clear()
    for name in ("UltimateSDUpscale", "KSampler"):
        whole = run_as(monkeypatch, name, full, subject, copied)
        assert torch.equal(whole, sample(full, positive(subject), negative()))
    assert "MoMA" not in caplog.text


def test_a_lost_subject_is_said_once_for_an_execution_and_only_if_it_acts(
    model: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As a detailer with several crops runs, with prompts of its own."""
    lost = "no positive prompt of this run knows where the subject 'car' is"
    subject = tiny_subject(adapter, seed=309)
    for weight, count in ((0.0, 0), (1.0, 1)):
        caplog.clear()
        with CurrentNodeContext("prompt", f"crops {weight}", 0):
            for seed in range(3):
                sample(moma(model, adapter, subject, weight=weight), positive(), negative(), steps=1, seed=seed)
        assert [lost in record.getMessage() for record in caplog.records].count(True) == count


def test_a_single_evaluation_is_said_only_where_the_features_reached_everything(
    model: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    subject = tiny_subject(adapter, seed=310)
    first = {"steps": 4, "sampler": "euler", "scheduler": "normal", "last_step": 1}
    stopped = "stopped after one evaluation of the model"
    off = moma(model, adapter, subject, weight=0.0)
    sample(off, positive(subject), negative(), **first)
    sample(with_region(model, adapter, subject, torch.ones(1, 8, 8)), positive(subject), negative(), **first)
    assert stopped not in caplog.text
    sample(moma(off, adapter, subject), positive(subject), negative(), **first)
    assert stopped in caplog.text


def test_how_runs_of_one_node_follow_one_another() -> None:
    one, other, result = (seeded(seed, "latent", (1, 4, 8, 8)) for seed in (1, 2, 3))
    part_of_it = torch.where(torch.arange(8) < 4, result, other)
    nothing, larger = torch.zeros(1, 4, 8, 8), seeded(4, "latent", (1, 4, 12, 12))

    def relation(given: torch.Tensor, node: Any = NODE, start: float = 10.0, end: float = 0.0) -> str:
        before = Trace.begun(NODE if node != () else None, one, torch.tensor([10.0, end]))
        before.end_with(result, {})
        return Trace.begun(NODE if node != () else None, given, torch.tensor([start, 0.0])).after(before)

    before = Trace.begun(NODE, one, torch.tensor([10.0, 0.0]))
    before.end_with(result, {})
    assert Trace.begun(NODE, other, torch.tensor([10.0, 0.0])).after(None) == FIRST
    assert Trace.begun(("prompt", "node", 1), other, torch.tensor([10.0, 0.0])).after(before) == FIRST
    assert relation(other) == relation(other, node=()) == PART
    assert relation(one) == relation(nothing) == relation(larger) == WHOLE
    assert relation(result) == relation(part_of_it) == GOES_ON
    assert relation(other, start=5.0, end=5.0) == GOES_ON and relation(other, start=10.0, end=5.0) == PART
    assert relation(result, node=()) == WHOLE, "outside of an execution nothing is taken over"


def in_steps(model: Any, subject: Any, node: Any, last: int = 4) -> torch.Tensor:
    """Step by step, each a run of its own, in one execution of a node."""
    import comfy.sample

    options = {"steps": 4, "sampler": "euler", "scheduler": "normal"}
    with CurrentNodeContext(*node):
        latent = sample(model, positive(subject), negative(), **options, last_step=1)
        for step in range(1, last):
            inputs = (4, 7.5, "euler", "normal", positive(subject), negative(), latent)
            with torch.inference_mode():
                latent = comfy.sample.sample(
                    model,
                    torch.zeros_like(latent),
                    *inputs,
                    disable_noise=True,
                    start_step=step,
                    last_step=step + 1,
                    disable_pbar=True,
                )
    return latent


def test_the_mask_goes_on_from_step_to_step_of_one_node(
    model: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs of one step each give what one run of all steps gives; the first one says that it had no mask."""
    subject = tiny_subject(adapter, seed=304)
    full = moma(model, adapter, subject, shortcut=tiny_shortcut())
    whole = sample(full, positive(subject), negative(), steps=4, sampler="euler", scheduler="normal")
    with caplog.at_level(logging.WARNING):
        assert close(in_steps(full, subject, ("prompt", "steps", 0)), whole, 1e-5)
    (said,) = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
    assert "stopped after one evaluation of the model" in said and "give the subject a region_mask" in said
    assert not close(in_steps(full, subject, ("prompt", "steps", 0), last=1), whole, 1e-2)


def test_unknown_nodes_on_several_pictures_are_warned_of_once(
    model: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    subject = tiny_subject(adapter, seed=305)
    full = moma(model, adapter, subject)
    with caplog.at_level(logging.WARNING), CurrentNodeContext("prompt", "unknown", 0):
        for seed in range(4):
            sample(full, positive(subject), negative(), denoise=0.6, seed=seed)
    (said,) = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
    assert "a node works on several pictures or parts of one, and MoMA looks for the subject 'car' in each" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for seed in range(4):  # a list: each item is an execution of its own
            with CurrentNodeContext("prompt", "list", seed):
                sample(full, positive(subject), negative(), denoise=0.6, seed=seed)
    assert not [record for record in caplog.records if "MoMA" in record.getMessage()]


def test_without_a_server_no_node_is_known() -> None:
    assert editor.executing_node() == (None, None)
    with CurrentNodeContext("prompt", "5", 2):
        assert editor.executing_node() == (("prompt", "5", 2), None)
