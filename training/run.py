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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "training", help="where state and results lie")
    parser.add_argument("--pictures", type=int, default=100_000, help="how many pictures are painted")
    parser.add_argument("--share", type=float, default=1.0, help="of the planned samples: 0.01 for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="on a CPU")
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
    from comfyui_moma.training import diffusion, export, eye, language, small_adapter, vae
    from comfyui_moma.training.adapter_weights import TrainableAdapter, first_weights
    from comfyui_moma.training.latents import Latents

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def shortened(plan: vae.Plan) -> vae.Plan:
        return replace(plan, samples=int(plan.samples * options.share))

    folder = options.folder
    if not (folder / "vae" / "vae.pt").is_file():
        vae.train(folder / "vae", device, shortened(vae.PLAN))
    autoencoder = vae.build().to(device).eval().requires_grad_(False)
    autoencoder.load_state_dict(torch.load(folder / "vae" / "vae.pt", map_location=device, weights_only=True))
    latents = Latents(folder / "latents.f16", options.pictures)
    latents.encode(autoencoder, device)
    if not (folder / "diffusion" / "diffusion.pt").is_file():
        diffusion.train(folder / "diffusion", latents, autoencoder, device, shortened(diffusion.PLAN))
    if not (folder / "eye" / "eye.pt").is_file():
        eye.train(folder / "eye", device, shortened(eye.PLAN))
    seeing = eye.Eye().to(device).eval().requires_grad_(False)
    seeing.load_state_dict(torch.load(folder / "eye" / "eye.pt", map_location=device, weights_only=True))
    if not (folder / "language" / "language.pt").is_file():
        language.train(folder / "language", seeing, device, shortened(language.PLAN))
    base, reader = diffusion.TextToImage(), language.SubjectReader()
    for stage, module in (("diffusion", base), ("language", reader)):
        state = torch.load(folder / stage / f"{stage}.pt", map_location=device, weights_only=True)
        module.to(device).eval().requires_grad_(False).load_state_dict(state)
    if not (folder / "adapter" / "adapter.pt").is_file():
        plan = shortened(small_adapter.PLAN)
        small_adapter.train(folder / "adapter", base, reader, latents, autoencoder, device, plan)
    adapter = TrainableAdapter(first_weights(base.unet, eye.SIZE, language.language_shape().hidden_size))
    state = torch.load(folder / "adapter" / "adapter.pt", map_location="cpu", weights_only=True)
    adapter.load_state_dict(state)
    export.export(folder / "export", autoencoder, base, reader, adapter, latents.scale)
    print(f"The small world's files are in {folder / 'export'}.")


if __name__ == "__main__":
    main()
