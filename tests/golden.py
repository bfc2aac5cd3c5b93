"""Run one golden case through the pack and report the worst step.

    COMFYUI_PATH=... python tests/golden.py --dir tests/data/golden --case tiny_context

Prints `{"eps": ..., "mask": ...}`: the largest relative L2 error of eps and the largest mean absolute error of the
subject mask over the stored steps. Exits 1 when either is above 1e-4.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent.parent))
from workbench.bootstrap import bootstrap
from workbench.tiny_models import adapter_groups, tiny_model

TOLERANCE = 1e-4
CFG = 7.5


@dataclass
class Recorder:
    """Collects what the UNet is given and returns, and the mask after every evaluation."""

    eps: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)

    def unet(self, executor: Any, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: Any, **kw: Any):
        out = executor(x, timesteps, context, y, control, options, **kw)
        if options.get("moma") is not None:  # not the reference pass
            order = options["cond_or_uncond"]
            rows = {index: part for index, part in zip(order, out.chunk(len(order)), strict=True)}
            self.eps.append(torch.cat([rows[1], rows[0]]))
        return out

    def evaluation(self, executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any, **kwargs: Any):
        out = executor(x, timestep, model_options, *args, **kwargs)
        self.masks.append(model_options["transformer_options"]["moma"].masks[0, 0].clone())
        return out


def run_case(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Recorder]:
    """Sample a case through the real patches; returns its description, its trace and the recording."""
    bootstrap()
    import comfy.samplers
    import comfy.utils
    from comfy.patcher_extension import WrappersMP
    from comfyui_moma.moma_modules.adapter.loading import load_adapter
    from comfyui_moma.moma_modules.prompt.marks import mark_tokens
    from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Settings, Shortcut
    from comfyui_moma.moma_modules.sampling.unet import check_model
    from comfyui_moma.moma_modules.sampling.wrappers import patched
    from comfyui_moma.moma_modules.subject.subject import Subject

    case = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    inputs = load_file(folder / f"{name}.inputs.safetensors")
    trace = load_file(folder / f"{name}.trace.safetensors")
    model = tiny_model(case["unet"])
    with tempfile.TemporaryDirectory() as temp:
        path = Path(temp) / "attn_adapters_projectors.th"
        torch.save(adapter_groups(case["unet"], embedding=inputs["llava_emb"].shape[1]), path)
        adapter = load_adapter(path)
    check_model(model, adapter)
    size = inputs["mask"].shape[-2:]
    subject = Subject(
        embedding=inputs["llava_emb"].float(),
        word=case["subject"],
        prompt=case["prompt"],
        images=torch.zeros(1, *size, 3, dtype=torch.uint8),
        masks=inputs["mask"].view(1, *size) > 0,
        adapter_identity=adapter.identity,
    )
    shortcut = Shortcut(
        latent=model.model.process_latent_out(inputs["ref_latent"]),
        text=inputs["text_subject"],
        noise=inputs["ref_noise"],
        strength=case["strength"],
    )
    recorder = Recorder()
    model = model.clone()
    # Registered before ours, hence outermost: sees the masks once our own wrapper has finished them.
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "golden", recorder.evaluation)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "golden", recorder.unet)
    settings = Settings().with_subject(subject, adapter, image_tokens=ImageTokens(), shortcut=shortcut)
    model = patched(model, settings)

    positive = mark_tokens([[inputs["text_cond"], {}]], {subject.key: tuple(case["subject_token_idx"])})
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, [[inputs["text_uncond"], {}]])
    guider.set_cfg(case.get("cfg_scale", CFG))
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.sigmas[t]) for t in case["timesteps"]] + [0.0])
    scale = (sigmas[0] ** 2 + 1).sqrt() / sigmas[0]
    noise = inputs["init_noise"] * scale
    with torch.inference_mode():
        guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("ddim"), sigmas, disable_pbar=True, seed=0
        )
    return case, trace, recorder


def errors(case: dict[str, Any], trace: dict[str, torch.Tensor], recorder: Recorder) -> dict[str, float]:
    """The worst step's errors against the trace."""
    worst = {"eps": 0.0, "mask": 0.0}
    for i in case["stored_steps"]:
        expected = trace[f"eps.{i}"].float()
        worst["eps"] = max(worst["eps"], float((recorder.eps[i] - expected).norm() / expected.norm()))
    for i, expected in enumerate(trace["masks"].float()):
        error = float((recorder.masks[i] - expected.view_as(recorder.masks[i])).abs().mean())
        worst["mask"] = max(worst["mask"], error)
    return worst


def main() -> int:
    """Run the case named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--case", required=True)
    args = parser.parse_args()
    worst = errors(*run_case(args.dir, args.case))
    print(json.dumps(worst))
    return int(any(not value <= TOLERANCE for value in worst.values()))


if __name__ == "__main__":
    sys.exit(main())
