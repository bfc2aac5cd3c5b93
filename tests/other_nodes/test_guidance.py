"""MoMA beside guidance nodes: each adds its own evaluations or arithmetic, none may change what MoMA sees."""

from typing import Any

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, Noise_RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from compat_rows import message

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_shortcut

SHORT = {"size": (16, 16), "steps": 2, "last_step": 1}
"""One evaluation, whose mask is read afterwards."""


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 2, **kwargs})


def skip_layer(model: Any) -> Any:
    """Skip-layer guidance for this UNet, as the SLG nodes do it for others: one more evaluation without a block."""
    clone = model.clone()

    def skipped(q: Any, k: Any, v: torch.Tensor, extra_options: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    def post_cfg(args: dict[str, Any]) -> torch.Tensor:
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), skipped, "attn2", "output", 9
        )
        inputs = (args["model"], [args["cond"]], args["input"], args["sigma"], options)
        (weaker,) = comfy.samplers.calc_cond_batch(*inputs)
        return args["denoised"] + 3.0 * (args["cond_denoised"] - weaker)

    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


GUIDANCE = {
    "PAG": lambda model: PerturbedAttentionGuidance.execute(model, 3.0)[0],
    "SAG": lambda model: SelfAttentionGuidance.execute(model, 0.5, 2.0)[0],
    "skip-layer": skip_layer,
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "CFG-Zero": lambda model: CFGZeroStar.execute(model)[0],
}


@pytest.mark.parametrize("name", list(GUIDANCE))
def test_guidance_in_either_order(model: Any, adapter: Any, subject: Any, full: Any, name: str) -> None:
    """Both orders give one picture, that of neither alone, and the mask of the first evaluation is untouched."""
    add = GUIDANCE[name]
    after, before = add(full), moma(add(model), adapter, subject, shortcut=tiny_shortcut())
    ours, theirs = run(after, subject, **SHORT), run(full, subject, **SHORT)
    assert torch.equal(run(before, subject, **SHORT), ours)
    assert not close(ours, theirs, 1e-3) and not close(ours, run(add(model), subject, **SHORT), 1e-3)
    one, other = masks_of(after, ours)[subject.key], masks_of(full, theirs)[subject.key]
    assert torch.allclose(one, other, atol=1e-5)


CHANGED_FEATURES = {
    "FreeU": lambda model: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0],
    "NAG": lambda model: NAGuidance.execute(model, 5.0, 0.5, 1.5)[0],
    "Deep Shrink": lambda model: PatchModelAddDownscale.execute(model, 3, 2.0, 0.0, 0.9, True, "bicubic", "bicubic")[0],
}


@pytest.mark.parametrize("name", list(CHANGED_FEATURES))
def test_changed_features_in_either_order(model: Any, adapter: Any, subject: Any, full: Any, name: str) -> None:
    """Nodes that change what flows through the UNet, its size included: both orders agree, both nodes act."""
    add = CHANGED_FEATURES[name]
    size = (16, 16)  # smaller ones make FreeU divide by zero
    after, before = add(full), moma(add(model), adapter, subject, shortcut=tiny_shortcut())
    ours = run(after, subject, size=size)
    assert torch.equal(run(before, subject, size=size), ours)
    for other in (full, add(model)):
        assert not close(ours, run(other, subject, size=size), 1e-2)
    assert float(masks_of(after, ours)[subject.key].std()) > 0.05


def guided(guider: Any, steps: int = 2) -> torch.Tensor:
    """SamplerCustomAdvanced with euler on the model's own schedule."""
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    sampler = KSamplerSelect.execute("euler").args[0]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    with torch.inference_mode():
        out = SamplerCustomAdvanced.execute(Noise_RandomNoise(1), guider, sampler, sigmas, latent)
    return out.args[0]["samples"]


def test_a_negative_prompt_on_another_model_is_said(
    model: Any, full: Any, subject: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows are taken for negative ones; the mask comes from the positive prompt."""
    node = getattr(nodes_custom_sampler, "DualModelGuider", None)
    if node is None:
        pytest.skip("ComfyUI has it from 0.30 on")
    with caplog.at_level("WARNING"):
        ours = guided(node.execute(full, positive(subject), 5.0, model, negative()).args[0])
    assert caplog.text.count(message("Dual Model CFG Guider")) == 1
    plain = guided(node.execute(model, positive(subject), 5.0, model, negative()).args[0])
    assert not close(ours, plain, 1e-2) and float(masks_of(full, ours)[subject.key].std()) > 0.05


def empty() -> list:
    return negative(seed=18)


def test_both_perp_neg_nodes_agree(model: Any, subject: Any, full: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The deprecated node encodes its empty prompt during the run, the guider brings it along: one picture."""
    caplog.set_level("WARNING")
    for patched in (model, full):
        perp_neg = PerpNeg.execute(patched, empty(), 0.8).args[0]
        by_node = guided(CFGGuider.execute(perp_neg, positive(subject), negative(), 5.0).args[0])
        guider = PerpNegGuider.execute(patched, positive(subject), negative(), empty(), 5.0, 0.8).args[0]
        assert close(by_node, guided(guider), 1e-5)
        plain = guided(CFGGuider.execute(patched, positive(subject), negative(), 5.0).args[0])
        assert not close(by_node, plain, 1e-2)
    assert not close(guided(guider), guided(PerpNegGuider.execute(model, *guider_inputs(subject)).args[0]), 1e-2)
    assert "MoMA" not in caplog.text


def guider_inputs(subject: Any) -> tuple[Any, ...]:
    return positive(subject), negative(), empty(), 5.0, 0.8


def test_perp_neg_rows_are_negative(subject: Any, full: Any) -> None:
    """Of the three prompts of the guider only the positive one gets the subject's image tokens."""
    kinds: list[list[int]] = []
    patch = full.clone()
    slot = patch.model_options["transformer_options"]["patches_replace"]["attn2"][("input", 1)]
    original = slot.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        kinds.append([extra_options["cond_or_uncond"], forward.rows.positive.tolist()])
        return original(out, q, k, forward, extra_options)

    slot.add_subjects = add_subjects
    guided(PerpNegGuider.execute(patch, *guider_inputs(subject)).args[0])
    assert kinds and all(positives == [int(kind == 0) for kind in order] for order, positives in kinds)


def test_sampler_custom_advanced_is_the_ksampler(subject: Any, full: Any) -> None:
    import comfy.sample

    latent = torch.zeros(1, 4, 8, 8)
    noise = Noise_RandomNoise(1).generate_noise({"samples": latent})
    inputs = (full, noise, 2, 5.0, "euler", "normal", positive(subject), negative(), latent)
    with torch.inference_mode():
        expected = comfy.sample.sample(*inputs, seed=1, disable_pbar=True)
    assert torch.equal(guided(CFGGuider.execute(full, positive(subject), negative(), 5.0).args[0]), expected)


@pytest.mark.parametrize(("prediction", "zsnr"), [("v_prediction", False), ("v_prediction", True), ("lcm", False)])
def test_other_model_samplings(model: Any, adapter: Any, subject: Any, full: Any, prediction: str, zsnr: bool) -> None:
    """v-prediction, zero terminal SNR and LCM: either order, and the reference pass follows the run's sampling."""

    def changed(other: Any) -> Any:
        return ModelSamplingDiscrete().patch(other, prediction, zsnr)[0]

    options = {"sampler": "lcm" if prediction == "lcm" else "euler", "scheduler": "sgm_uniform", "steps": 3}
    after, before = changed(full), moma(changed(model), adapter, subject, shortcut=tiny_shortcut())
    ours = run(after, subject, **options)
    assert ours.isfinite().all() and torch.equal(run(before, subject, **options), ours)
    assert not close(ours, run(changed(model), subject, **options), 1e-2)
    assert float(masks_of(after, ours)[subject.key].std()) > 0.05


def test_lcm_without_guidance(model: Any, subject: Any, full: Any) -> None:
    """CFG 1 evaluates the positive prompt alone; the mask is then normalised over that half."""
    lcm = ModelSamplingDiscrete().patch(full, "lcm", False)[0]
    options = {"sampler": "lcm", "scheduler": "sgm_uniform", "steps": 4, "cfg": 1.0}
    rows: list[int] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    samples = run(lcm, subject, **options)
    handle.remove()
    assert rows[-4:] == [1] * 4 and samples.isfinite().all()
    mask = masks_of(lcm, samples)[subject.key]
    assert float(mask.min()) == 0 and float(mask.max()) == 1
