"""Makes the small world from nothing: `python3 training/run.py`.

Does its own set-up, trains on a GPU if there is one, and goes on where it was stopped, at any point. State, loss curves
and sample sheets lie in the cache folder, see `scripts/setup_env.py`.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from comfyui_source import cache_dir
from inside import comfyui_inside

STAGES = ("vae", "diffusion", "vision", "language", "adapter")
NEEDED = {name: STAGES[:i] for i, name in enumerate(STAGES)} | {"vision": (), "language": ("vision",)}
"""Those that come before each; what reads references needs none of what draws."""
PROBE = "probe"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "training", help="where state and results lie")
    parser.add_argument("--pictures", type=int, default=100_000, help="how many pictures are encoded")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the planned samples; a larger share goes on from a smaller one"
    )
    parser.add_argument(
        "--stage",
        choices=(*STAGES, PROBE),
        help="only this one; those it needs stay as they are (vision needs none); probe: what measures them",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="on a CPU")
    parser.add_argument("--anew", action="store_true", help="from nothing, not from the weights in weights/")
    return parser.parse_args()


def main() -> None:
    """Run every stage that is not done."""
    options = parse_arguments()
    sys.path.insert(0, str(comfyui_inside(str(Path(__file__).resolve()))))
    from comfy.cli_args import args

    from workbench.bootstrap import bootstrap

    args.use_pytorch_cross_attention = True  # What ComfyUI takes on a CPU is slower in training.
    bootstrap()
    import torch
    from comfyui_moma.training import diffusion, export, language, probe, small_adapter, vae, vision
    from comfyui_moma.training.latents import Latents
    from comfyui_moma.training.loop import Start, samples_seen

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, share = options.folder, options.share
    if options.stage == PROBE:
        probe.save(probe.train(folder / PROBE, device, probe.PLAN.shortened(share)))
        return
    start = None if options.anew else export.read_back(ROOT / "weights")
    plans = {
        name: stage.PLAN.shortened(share if options.stage in (None, name) else 0)
        for name, stage in zip(STAGES, (vae, diffusion, vision, language, small_adapter), strict=True)
    }
    for name in NEEDED.get(options.stage, ()):
        if not samples_seen(folder / name, getattr(start, name, None)):
            sys.exit(f"error: stage {name} comes before {options.stage}, and {folder} holds nothing of it.")
    if options.stage not in ("vision", "language"):
        latents = Latents(folder / "latents.f16", options.pictures, start.scale if start else None)
        if len(latents) == 0 and not start:
            first = replace(vae.ENCODER, samples=min(vae.ENCODER.samples, plans["vae"].samples))
            autoencoder = vae.train(folder / "vae", device, first, encoder=True)
        else:
            autoencoder = vae.train(folder / "vae", device, plans["vae"], encoder=False, start=start and start.vae)
        latents.encode(autoencoder, device)
        if options.stage == "vae":
            return
        of_diffusion = start and start.diffusion
        base = diffusion.train(folder / "diffusion", latents, autoencoder, device, plans["diffusion"], of_diffusion)
        if options.stage == "diffusion":
            return
    tower = vision.train(folder / "vision", device, plans["vision"], start and start.vision)
    if options.stage == "vision":
        return
    before = Start({**(start.language.weights if start else {}), **tower}, start.language.seen if start else 0)
    reader = language.train(folder / "language", device, plans["language"], before)
    if options.stage == "language":
        return
    stages = (base, reader, latents, autoencoder)
    of_adapter = start and start.adapter
    begun = samples_seen(folder / "adapter", None)
    if start and not begun and samples_seen(folder / "language", start.language) > start.language.seen:
        known = language.SubjectReader()
        known.load_state_dict(start.language.weights, strict=False)
        of_adapter = small_adapter.refitted(start.adapter, known.to(device).eval(), reader)
    adapter = small_adapter.train(folder / "adapter", *stages, device, plans["adapter"], of_adapter)
    seen = {name: samples_seen(folder / name, getattr(start, name, None)) for name in plans}
    export.export(folder / "export", autoencoder, base, reader, adapter, latents.scale, seen)
    print(f"The small world's files are in {folder / 'export'}.")


if __name__ == "__main__":
    main()
