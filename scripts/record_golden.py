"""Records anew what the released code computes: `python3 scripts/record_golden.py --moma-repo CHECKOUT`.

Reads the inputs of each case of `tests/data/golden`, runs the released code in fp32 on the CPU on the small network of
the tests, and writes `CASE.trace.safetensors`. The checkout is one of github.com/bytedance/MoMA, whose code needs
diffusers, see `workbench/released_code.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from comfyui_source import ROOT
from inside import comfyui_inside

GOLDEN = ROOT / "tests" / "data" / "golden"
IMAGE_TOKENS = 4


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition(":")[0])
    parser.add_argument("--moma-repo", required=True, type=Path, help="a checkout of the released code")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="the folder of the cases (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder for the traces; default: that of the cases")
    return parser.parse_args()


def main() -> None:
    """Record every case, and say how far it is from the trace that was there."""
    options = parse_arguments()
    comfyui_inside(str(Path(__file__).resolve()))
    from workbench.bootstrap import bootstrap

    bootstrap()
    from safetensors.torch import load_file, save_file

    from workbench.released_code import MissingCodeError, import_released

    try:
        code = import_released(options.moma_repo)
    except MissingCodeError as error:
        sys.exit(f"error: {error}")
    code.in_fp32()
    out = options.out or options.golden
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(options.golden.glob("*.json")):
        inputs = load_file(options.golden / f"{file.stem}.inputs.safetensors")
        trace = record(code, json.loads(file.read_text(encoding="utf-8")), inputs)
        before = options.golden / f"{file.stem}.trace.safetensors"
        if before.is_file():
            print(f"{file.stem}: {_difference(trace, load_file(before)):.1e} from the trace before", flush=True)
        save_file(trace, out / f"{file.stem}.trace.safetensors")


def record(code: Any, case: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Run the released generation of a case.

    Args:
        code: `released_code.ReleasedCode`, in fp32.
        case: Its description, see `tests/golden.py`.
        inputs: Embeddings, latents, noise and the mask.

    Returns:
        The tensors of a trace: the image tokens, per step what the UNet said (row 0 negative, row 1 positive) and the
        mask found after it at the latent's size, per self-attention layer what it kept of the reference.
    """
    import torch
    from diffusers import DDIMScheduler

    from workbench.released_code import diffusers_unet, look_at_reference
    from workbench.tiny_models import adapter_groups, tiny_model

    latent = inputs["init_noise"]
    groups = adapter_groups(case["unet"], embedding=inputs["llava_emb"].shape[1])
    unet = diffusers_unet(case["unet"], tiny_model(case["unet"]).model.diffusion_model.state_dict())
    generator = code.generator(unet, torch.device("cpu"))
    layers = list(unet.attn_processors.values())
    for index, layer in enumerate(layers):
        own = {key.partition(".")[2]: value for key, value in groups["self_cross_attentions"].items()
               if key.partition(".")[0] == str(index)}  # fmt: skip
        layer.float().requires_grad_(False).load_state_dict(own)
    size = {"cross_attention_dim": case["unet"]["cross_attention_dim"], "clip_extra_context_tokens": IMAGE_TOKENS}
    project = code.generation.ImageProjModel(clip_embeddings_dim=inputs["llava_emb"].shape[1], **size)
    project.requires_grad_(False).load_state_dict(groups["projectors"])
    generator.image_proj_model = project
    positive, negative = generator.get_image_embeds_CFG(inputs["llava_emb"])
    trace = {"tokens_cond": positive.clone(), "tokens_uncond": negative.clone()}
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    mask = inputs["mask"].float()[None, None]
    masks: list[Any] = []

    def keep(_unet: Any, _given: Any, said: Any) -> None:
        trace[f"eps.{len(masks)}"] = said[0].clone()

    set_mask = generator.set_self_mask

    def keep_mask(mode: str, id_ig: str = "", mask: Any = None) -> None:
        if (mode, id_ig) == ("self", "ig"):
            masks.append(torch.nn.functional.interpolate(mask, size=latent.shape[-2:])[0, 0])
        set_mask(mode, id_ig, mask)

    with torch.inference_mode():
        generator.set_selfAttn_strength(case["strength"])
        noisy = scheduler.add_noise(inputs["ref_latent"], inputs["ref_noise"], torch.tensor([0]))
        look_at_reference(generator, noisy, inputs["text_subject"], mask, case["subject_token_idx"])
        for index, layer in enumerate(layers[::2]):
            keys, values = layer.store_ks, layer.store_vs
            sums = {"ref_k_sum": keys.sum(), "ref_k_absmean": keys.abs().mean(), "ref_v_absmean": values.abs().mean()}
            trace |= {f"{name}.{2 * index}": value.clone() for name, value in sums.items()}
        pipe = SimpleNamespace(
            unet=unet,
            scheduler=scheduler,
            moMA_generator=generator,
            prepare_latents=lambda *_: latent.clone(),
            vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=lambda latents, **_: (latents,)),
        )
        code.generation.add_function(pipe)
        generator.set_self_mask = keep_mask
        with_tokens = [
            torch.cat([inputs[name], tokens], dim=1)
            for name, tokens in (("text_uncond", negative), ("text_cond", positive))
        ]
        hook = unet.register_forward_hook(keep)
        pipe.generate_with_adapters(pipe, torch.cat(with_tokens), case["steps"], None)
        hook.remove()
    return {**trace, "masks": torch.stack(masks)}


def _difference(trace: dict[str, Any], before: dict[str, Any]) -> float:
    """The largest relative difference over their tensors.

    Raises:
        SystemExit: One has others than the other.
    """
    if set(trace) != set(before):
        sys.exit(f"error: recorded {sorted(set(trace) ^ set(before))} in one of the two only")
    return max(float((trace[name] - old).norm() / old.norm()) for name, old in before.items())


if __name__ == "__main__":
    main()
