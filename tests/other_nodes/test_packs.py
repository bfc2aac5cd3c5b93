"""MoMA beside other packs' own code, where it can be fetched: each in a process of its own, as many change ComfyUI.

A case builds the pack's node on the tiny model. The numbers are largest differences between latents, which have a
standard deviation near 1.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.prompt.marks import TOKENS_KEY, mark_tokens
from comfyui_moma.moma_modules.prompt.text import mark_subject
from compat_rows import message
from peers import apart, peer_module, peer_pack

from nodes import ControlNetApplyAdvanced
from workbench.scene import (
    CONTEXT,
    WORD_TOKENS,
    masks_of,
    moma,
    negative,
    positive,
    sample,
    tiny_adapter,
    tiny_shortcut,
    tiny_subject,
)
from workbench.tiny_models import seeded, tiny_clip, tiny_model, tiny_vae

Node = Callable[[Any], Any]
"""A MODEL with the pack's node on it."""


def mask(left: bool) -> torch.Tensor:
    found = torch.zeros(64, 64)
    found[:, :32] = 1.0
    return found if left else 1 - found


def dynamic_thresholding() -> Node:
    node = peer_module("mcmonkeyprojects", "sd-dynamic-thresholding", "dynthres_comfyui").DynamicThresholdingComfyNode()
    settings = (7.0, 0.9, "Constant", 0.0, "Constant", 0.0, 4.0, "enable", "MEAN", "AD", 1.0)
    return lambda model: node.patch(model, *settings)[0]


def skimmed_cfg() -> Node:
    node = peer_module("Extraltodeus", "Skimmed_CFG", "skimmed_CFG").CFG_skimming_single_scale_pre_cfg_node()
    return lambda model: node.patch(model, 3.0)[0]


def automatic_cfg() -> Node:
    node = peer_module("Extraltodeus", "ComfyUI-AutomaticCFG", "nodes").simpleDynamicCFG()
    return lambda model: node.patch(model, True, True)[0]


def perturbed_attention() -> Node:
    node = peer_module("pamparamm", "sd-perturbed-attention", "pag_nodes").PerturbedAttention()
    return lambda model: node.patch(model, 3.0)[0]


def smoothed_energy() -> Node:
    node = peer_module("pamparamm", "sd-perturbed-attention", "pag_nodes").SmoothedEnergyGuidanceAdvanced()
    return lambda model: node.patch(model, 3.0)[0]


def sliding_window(tile: int) -> Node:
    node = peer_module("pamparamm", "sd-perturbed-attention", "pag_nodes").SlidingWindowGuidanceAdvanced()
    return lambda model: node.patch(model, 5.0, tile, tile, 16, -1.0, -1.0)[0]


def style_aligned(share_norm: str) -> Node:
    pack = peer_pack("brianfitzgerald", "style_aligned_comfy")
    node = pack.NODE_CLASS_MAPPINGS["StyleAlignedBatchAlign"]()
    return lambda model: node.patch(model, share_norm, "q+k", 1.0)[0]


def first_block_cache() -> Node:
    node = peer_module("chengzeyi", "Comfy-WaveSpeed", "fbcache_nodes").ApplyFBCacheOnModel()
    return lambda model: node.patch(model, "diffusion_model", 0.3)[0]


def evolved_sampling() -> Node:
    """AnimateDiff-Evolved's sampling in context windows, without a motion model."""
    nodes = peer_module("Kosinkadink", "ComfyUI-AnimateDiff-Evolved", "animatediff.nodes_gen2")
    context = peer_module("Kosinkadink", "ComfyUI-AnimateDiff-Evolved", "animatediff.context")
    windows = context.ContextOptionsGroup()
    options = context.ContextOptions(context_length=2, context_stride=1, context_overlap=1)
    options.context_schedule = "standard_uniform"
    windows.add(options)
    node = nodes.UseEvolvedSamplingNode()
    return lambda model: node.use_evolved_sampling(model, "use existing", context_options=windows)[0]


def brushnet() -> Node:
    patch = peer_module("nullquant", "ComfyUI-BrushNet", "model_patch")

    def add(model: Any) -> Any:
        clone = model.clone()
        patch.patch_model_function_wrapper(clone, lambda *_: None)
        # Its last version fails on ComfyUI's newer argument `latent_shapes`, MoMA or not.
        (theirs,) = clone.wrappers["outer_sample"][None]
        clone.wrappers["outer_sample"][None] = [lambda *args, latent_shapes=None, **kwargs: theirs(*args, **kwargs)]
        return clone

    return add


def layer_diffuse() -> Node:
    sharing = peer_module("huchenlei", "ComfyUI-layerdiffuse", "lib_layerdiffusion.attention_sharing")

    def add(model: Any) -> Any:
        clone = model.clone()
        sharing.AttentionSharingPatcher(clone, frames=1, use_control=False)
        return clone

    return add


def couple_cgem() -> Node:
    part = ("laksjdjf", "cgem156-ComfyUI", "scripts.attention_couple.node")
    node = peer_module(*part, ROOT_NAME="", SYMBOL="", NODE_SURFIX="").AttentionCouple()
    regions = {"cond_1": positive(seed=71), "mask_1": mask(False)}
    return lambda model: node.attention_couple_simple(model, mask(True), **regions)[0]


def couple_ppm() -> Node:
    """What its node does for SD1.5; the node's own module also wants the newest ComfyUI's other models."""
    couple = peer_module("pamparamm", "ComfyUI-ppm", "src.attention_couple.unet_couple")

    def add(model: Any) -> Any:
        clone = model.clone()
        device, dtype = model.load_device, torch.float32
        prompts = (positive(seed=72), [positive(seed=71)])
        clone.set_model_attn2_patch(couple.unet_attn2_couple_wrapper(*prompts, 2, False, device, dtype))
        clone.set_model_attn2_output_patch(
            couple.unet_attn2_output_couple_wrapper(torch.stack([mask(True), mask(False)]))
        )
        return clone

    return add


def tiled_diffusion() -> Node:
    node = peer_module("shiimizu", "ComfyUI-TiledDiffusion", "tiled_diffusion").TiledDiffusion()
    return lambda model: node.apply(model, "MultiDiffusion", 64, 64, 8, 1)[0]


def run(model: Any, subject: Any, **changes: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 3, **changes})


def scene() -> tuple[Any, Any, Callable[..., Any]]:
    """A fresh model, a subject, and MoMA on a model."""
    adapter = tiny_adapter()
    subject = tiny_subject(adapter)

    def full(model: Any, weight: float = 1.0, strength: float = 1.0) -> Any:
        return moma(model, adapter, subject, weight=weight, shortcut=tiny_shortcut(strength))

    return tiny_model(), subject, full


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def mask_of(model: Any, samples: torch.Tensor, subject: Any) -> float:
    """How much the mask of a run varies."""
    return float(masks_of(model, samples)[subject.key].std())


def by_itself(work: Callable[[], Any]) -> Any:
    """What a pack does without MoMA; skipped where it cannot do it on this ComfyUI."""
    try:
        return work()
    except (TypeError, AttributeError, ImportError) as error:
        pytest.skip(f"the pack fails on this ComfyUI by itself: {error}")


def measure(build: Callable[[], Node], settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a node that works."""
    node = build()
    model, subject, full = scene()
    alone = run(full(model), subject, **settings)
    theirs = by_itself(lambda: run(node(model), subject, **settings))
    patched = node(full(model))
    after = run(patched, subject, **settings)
    off = run(node(full(model, 0.0, 0.0)), subject, **settings)
    return {
        "orders": difference(after, run(full(node(model)), subject, **settings)),
        "moma": difference(after, theirs),
        "theirs": difference(after, alone),
        "off": difference(off, theirs),
        "mask": mask_of(patched, after, subject),
        "finite": bool(after.isfinite().all()),
    }


def refusal(build: Callable[[], Node], settings: dict[str, Any]) -> dict[str, Any]:
    """What the user sees of a node that is refused, in both orders, and how far the model is from a fresh one."""
    node = build()
    model, subject, full = scene()
    plain = run(model, subject, **settings)
    errors = []
    for patched in (node(full(model)), full(node(model))):
        with pytest.raises(ValueError, match="^MoMA: ") as raised:
            run(patched, subject, **settings)
        errors.append(str(raised.value))
    return {"errors": errors, "model": difference(run(model.clone(), subject, **settings), plain)}


@dataclass(frozen=True)
class Case:
    """A pack that works.

    Attributes:
        orders: How far the two orders of nodes may be apart.
        changes: Whether its node changes the picture at all.
    """

    build: Callable[[], Node]
    orders: float = 0.0
    changes: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


WORKING = {
    "Dynamic Thresholding": Case(dynamic_thresholding),
    "Skimmed CFG": Case(skimmed_cfg),
    "AutomaticCFG": Case(automatic_cfg),
    "Perturbed-Attention (pack)": Case(perturbed_attention),
    "Smoothed Energy Guidance": Case(smoothed_energy),
    "Sliding Window Guidance": Case(lambda: sliding_window(64)),
    "StyleAligned": Case(lambda: style_aligned("disabled"), settings={"batch": 2, "size": (16, 16)}),
    "StyleAligned share_norm": Case(lambda: style_aligned("both"), settings={"batch": 2, "size": (16, 16)}),
    "WaveSpeed first-block cache": Case(first_block_cache, settings={"steps": 8}),
    "AnimateDiff-Evolved sampling": Case(evolved_sampling, orders=1e-5, changes=False, settings={"batch": 4}),
    "BrushNet": Case(brushnet, changes=False),
}


@pytest.mark.parametrize("name", WORKING)
def test_packs_that_work(name: str) -> None:
    """Either order, one picture; MoMA acts in it, and so does the pack; the mask forms; MoMA at zero is no MoMA."""
    case = WORKING[name]
    found = apart(lambda: measure(case.build, case.settings))
    assert found["finite"] and found["orders"] <= case.orders and found["off"] <= case.orders, found
    assert found["moma"] > 0.05 and found["mask"] > 0.05, found
    assert found["theirs"] > 1e-5 if case.changes else found["theirs"] <= 1e-4, found


REFUSED = {
    "LayerDiffuse (SD1.5)": Case(layer_diffuse),
    "Attention couple (cgem156)": Case(couple_cgem),
    "Attention couple (ppm)": Case(couple_ppm),
    "Sliding Window Guidance above its window": Case(lambda: sliding_window(64), settings={"size": (16, 16)}),
    "TiledDiffusion": Case(tiled_diffusion),
}


@pytest.mark.parametrize("name", REFUSED)
def test_packs_that_are_refused(name: str) -> None:
    """Either order: the user is told by name, and the model is as it was."""
    case = REFUSED[name]
    found = apart(lambda: refusal(case.build, case.settings))
    assert all(message(name) in error for error in found["errors"]) and found["model"] == 0, found


Sampler = Callable[[Any, list, list], torch.Tensor]
"""A node that samples: model, positive, negative to latents."""


def lanpaint() -> Sampler:
    node = peer_module("scraed", "LanPaint", "src.LanPaint.nodes").LanPaint_KSampler()
    noise_mask = torch.zeros(1, 8, 8)
    noise_mask[..., 4:] = 1.0
    latent = {"samples": 0.3 * seeded(5, "latent", (1, 4, 8, 8)), "noise_mask": noise_mask}
    settings = {"LanPaint_NumSteps": 2}
    return lambda model, yes, no: node.sample(model, 1, 3, 5.0, "euler", "karras", yes, no, latent, **settings)[0][
        "samples"
    ]


def res4lyf() -> Sampler:
    from server import PromptServer  # before 0.20 only a running server can be imported

    PromptServer(asyncio.new_event_loop())  # the pack's start adds routes to it
    node = peer_pack("ClownsharkBatwing", "RES4LYF").NODE_CLASS_MAPPINGS["ClownsharKSampler_Beta"]
    settings = {"sampler_name": "multistep/res_2m", "scheduler": "normal", "steps": 3, "denoise": 1.0, "cfg": 5.0}

    def sampled(model: Any, yes: list, no: list) -> torch.Tensor:
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        found = node.execute(model=model, seed=1, positive=yes, negative=no, latent_image=latent, **settings)
        return getattr(found, "args", found)[0]["samples"]

    return sampled


def sampled(build: Callable[[], Sampler]) -> dict[str, float]:
    """The numbers of a node that samples."""
    sampler = build()
    model, subject, full = scene()
    with torch.inference_mode():
        theirs = by_itself(lambda: sampler(model, positive(subject), negative()))
        patched = full(model)
        ours = sampler(patched, positive(subject), negative())
        off = sampler(full(model, 0.0, 0.0), positive(subject), negative())
    mask = mask_of(patched, ours, subject)
    return {"moma": difference(ours, theirs), "off": difference(off, theirs), "mask": mask}


SAMPLERS = {"LanPaint": lanpaint, "RES4LYF": res4lyf}


@pytest.mark.parametrize("name", SAMPLERS)
def test_packs_that_sample(name: str) -> None:
    """MoMA acts in their runs, its mask forms and is found afterwards; at zero it is not there."""
    found = apart(lambda: sampled(SAMPLERS[name]))
    assert found["off"] == 0 and found["moma"] > 0.05 and found["mask"] > 0.05, found


def reference_control(fidelity: float) -> dict[str, float]:
    """Advanced-ControlNet's reference, with and without MoMA; the first forward of a step is over the reference."""
    nodes = peer_module("Kosinkadink", "ComfyUI-Advanced-ControlNet", "adv_control.nodes_reference")
    control = nodes.ReferenceControlNetNode.execute("reference_attn", fidelity, 1.0).args[0]
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    model, subject, full = scene()
    hint = nodes.ReferencePreprocessorNode.execute(tiny_vae(), picture, {"samples": torch.zeros(1, 4, 8, 8)}).args[0]
    outputs: list[torch.Tensor] = []
    model.model.diffusion_model.out.register_forward_hook(lambda _, __, output: outputs.append(output))

    def controlled(candidate: Any) -> tuple[torch.Tensor, torch.Tensor]:
        applied = ControlNetApplyAdvanced().apply_controlnet(
            positive(subject), negative(), control.copy(), hint, 1.0, 0.0, 1.0
        )
        outputs.clear()
        torch.manual_seed(0)  # the noise on its reference comes from the global generator
        samples = sample(candidate, *applied, steps=3, sampler="euler", scheduler="normal")
        # One more forward, over MoMA's reference, comes first where MoMA is on.
        return samples, outputs[len(outputs) % 2]

    theirs, their_reference = by_itself(lambda: controlled(model))
    patched = full(model)
    ours, our_reference = controlled(patched)
    off, _ = controlled(full(model, 0.0, 0.0))
    return {
        "reference": difference(our_reference, their_reference),
        "moma": difference(ours, theirs),
        "off": difference(off, theirs),
        "theirs": difference(ours, run(patched, subject, sampler="euler", scheduler="normal")),
        "mask": mask_of(patched, ours, subject),
    }


@pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0])
def test_advanced_controlnet_reference(fidelity: float) -> None:
    """Its forward over the reference is what it is without MoMA, to the bit; both act in the picture."""
    found = apart(lambda: reference_control(fidelity))
    assert found["reference"] == 0 and found["off"] == 0, found
    assert found["moma"] > 0.05 and found["theirs"] > 1e-3 and found["mask"] > 0.05, found


def dense_diffusion() -> dict[str, Any]:
    nodes = peer_module("huchenlei", "ComfyUI_densediffusion", "densediffusion_node")
    model, subject, full = scene()

    def dense(candidate: Any) -> tuple[Any, list]:
        for left, seed in ((True, 7), (False, 71)):
            prompt = [[positive(seed=seed)[0][0], {"pooled_output": torch.zeros(1, CONTEXT)}]]
            candidate = nodes.DenseDiffusionAddCondNode().append(candidate, prompt, 1.0, mask(left)[None])[0]
        return nodes.DenseDiffusionApplyNode().apply(candidate)

    def sampled(candidate: Any, prompt: list) -> torch.Tensor:
        return sample(candidate, prompt, negative(154), steps=3)

    theirs = by_itself(lambda: sampled(*dense(model)))
    patched, prompt = dense(full(model))
    lost = sampled(patched, prompt)
    marked = sampled(patched, mark_tokens(prompt, {subject.key: WORD_TOKENS}))
    return {
        "moma": difference(lost, theirs),
        "lost": mask_of(patched, lost, subject),
        "mask": mask_of(patched, marked, subject),
    }


def test_dense_diffusion_forgets_the_marks() -> None:
    """Its prompt is a new one: the features reach the whole picture, until MoMA Mark Subject follows."""
    found = apart(dense_diffusion)
    assert found["moma"] > 0.05 and found["lost"] == 0 and found["mask"] > 0.05, found


def ella() -> dict[str, Any]:
    """ELLA with CLIP behind it, its network small and random: 64 tokens of its own, then CLIP's 77, per time step."""
    nodes = peer_module("TencentQQGYLab", "ComfyUI-ELLA", "ella")
    networks = peer_module("TencentQQGYLab", "ComfyUI-ELLA", "model")
    settings = {"time_channel": 32, "time_embed_dim": CONTEXT, "width": CONTEXT, "layers": 1, "heads": 4}
    network = networks.ELLAModel(**settings, input_dim=32)
    for name, weight in network.named_parameters():
        weight.data = 0.2 * seeded(81, name, tuple(weight.shape))
    model, subject, full = scene()
    clip, text = tiny_clip(), "photo of a car. on a beach"
    encoder = {"model": lambda text, max_length: seeded(82, text, (1, 16, 32))}
    steps = {"model": network, "timesteps": model.model.model_sampling.timestep(torch.tensor([14.6, 3.0, 0.5, 0.0]))}
    with torch.inference_mode():
        both, alone = nodes.EllaTextEncode().encode(steps, encoder, text, clip, text)
        no, _ = nodes.EllaTextEncode().encode(steps, encoder, "ugly", clip, "ugly")
    marked = mark_subject(clip, subject, both, text).conditioning
    expected = mark_subject(clip, subject, alone, text).conditioning[0][1][TOKENS_KEY][subject.key]
    patched = full(model)
    ours, theirs = sample(patched, marked, no, steps=3), by_itself(lambda: sample(model, both, no, steps=3))
    places = [known[TOKENS_KEY][subject.key] for _, known in marked]
    return {
        "lengths": {values.shape[1] for values, _ in both},
        "moved": {b - a for found in places for a, b in zip(expected, found, strict=True)},
        "moma": difference(ours, theirs),
        "mask": mask_of(patched, ours, subject),
    }


def test_ella() -> None:
    """MoMA Mark Subject finds CLIP's text behind ELLA's."""
    found = apart(ella)
    assert found["lengths"] == {141} and found["moved"] == {64}, found
    assert found["moma"] > 0.05 and found["mask"] > 0.05, found


def couple_in_prompts() -> dict[str, Any]:
    couple = peer_module("asagi4", "comfyui-prompt-control", "prompt_control.attention_couple_ppm")
    model, subject, full = scene()
    regions = [[values, {**known, "mask": mask(False)[None], "mask_strength": 1.0}] for values, known in positive()]
    prompt = couple.set_cond_attnmask(positive(subject), regions, fill=True)
    plain = run(model, subject)
    with pytest.raises(ValueError, match="^MoMA: ") as raised:
        sample(full(model), prompt, negative(), steps=2)
    return {"error": str(raised.value), "model": difference(run(model.clone(), subject), plain)}


def test_a_couple_in_the_prompts_is_refused() -> None:
    found = apart(couple_in_prompts)
    assert message("Attention couple (prompt-control)") in found["error"] and found["model"] == 0, found
