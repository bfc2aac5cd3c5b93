"""Trains an adapter on your pictures: `python3 training/adapter.py --checkpoint SD15 --mllm FOLDER --data FOLDER`.

Does its own set-up and goes on where it was stopped, at any point. What the data must look like, and what to expect of
a machine, is in docs/training.md.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from comfyui_source import cache_dir
from inside import comfyui_inside


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or these words in its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition(":")[0])
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--checkpoint", required=True, help="an SD1.5 checkpoint", **file)
    parser.add_argument("--mllm", required=True, help="a LLaVA-1.5 folder, or a converted file", type=Path)
    parser.add_argument("--data", required=True, help="pictures with metadata.jsonl", **folder)
    parser.add_argument("--clip-vision", help="an image encoder, whose embeddings the mapping learns first", **file)
    parser.add_argument("--start", help="an adapter to go on from, in place of fresh weights", **file)
    out = cache_dir() / "adapter"
    parser.add_argument("--out", default=out, help="where state and result lie (default: %(default)s)", **folder)
    parser.add_argument("--steps", default=20_000, help="of the adapter (default: %(default)s)", **count)
    parser.add_argument("--alignment-steps", default=5_000, help="of the mapping (default: %(default)s)", **count)
    parser.add_argument("--batch", default=8, help="rows a step (default: %(default)s)", **count)
    parser.add_argument("--parts", default=1, help="compute a batch in so many parts, to save memory", **count)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--size", default=512, help="side of the pictures in pixels (default: %(default)s)", **count)
    help_ = "of the reference, for pictures without one of their own (default: %(default)s)"
    parser.add_argument("--variants", default=2, help=help_, **count)
    parser.add_argument("--shown", default=4, help="pictures on a sample sheet (default: %(default)s)", **count)
    help_ = "default: bf16 on a GPU that has it, else fp32"
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help=help_)
    parser.add_argument("--mllm-precision", default="auto", help="as at Load MoMA MLLM (default: %(default)s)")
    parser.add_argument("--freeze-mapping", action="store_true", help="the mapping stays as it is after alignment")
    parser.add_argument("--keep-activations", action="store_true", help="faster, and more memory")
    parser.add_argument("--threads", default=os.cpu_count() or 1, help="on a CPU", **count)
    options = parser.parse_args(words)
    if options.size % 64 or options.size < 64:
        parser.error(f"--size is {options.size}, expected a multiple of 64")
    if min(options.steps, options.batch, options.parts, options.variants) < 1 or options.batch % options.parts:
        parser.error("--steps, --batch, --parts and --variants must be at least 1, and --parts divide --batch")
    return options


def main() -> None:
    """Prepare the data, train, and say where the result is."""
    options = parse_arguments()
    sys.path.insert(0, str(comfyui_inside(str(Path(__file__).resolve()))))
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True  # What ComfyUI takes on a CPU is slower in training.
    from workbench.bootstrap import bootstrap

    bootstrap()
    import torch

    torch.set_num_threads(options.threads)
    try:
        print(f"The adapter is {train(options)}.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def train(options: argparse.Namespace) -> Path:
    """Prepare and train as the options say.

    Returns:
        The path of the adapter.

    Raises:
        ValueError: Data, a model or an option is no good; the message names it.
    """
    import comfy.model_management
    import torch
    from comfyui_moma.moma_modules.mllm.loading import load_mllm
    from comfyui_moma.training.folder_data import read_entries
    from comfyui_moma.training.folder_stage import ALIGNMENT_RATE, align, check_parts, start_weights
    from comfyui_moma.training.folder_stage import train as train_adapter
    from comfyui_moma.training.loop import Plan
    from comfyui_moma.training.machine import find_machine
    from comfyui_moma.training.prepared import Prepared, encoded_by, hidden_of, items_of

    if not options.mllm.exists():
        raise ValueError(f"--mllm {options.mllm} is not there.")
    items = items_of(read_entries(options.data), options.variants, options.size)
    machine = find_machine(options.precision, comfy.model_management.get_torch_device())
    print(f"{len(items)} items, on {machine.device} in {machine.dtype}.", flush=True)
    mllm: Any = load_mllm(options.mllm, options.mllm_precision)
    _check_same(options, mllm.identity)
    hidden_size = mllm.hidden_size
    hidden = Prepared(options.out / "hidden", items, mllm.identity)
    hidden.compute("language model", hidden_of(mllm))
    del mllm
    comfy.model_management.unload_all_models()
    parts = _parts(options.checkpoint, machine.dtype)
    check_parts(parts)
    vision = _clip_vision(options.clip_vision)
    of = f"{_identity(options.checkpoint)} {options.clip_vision and _identity(options.clip_vision)}"
    encoded = Prepared(options.out / "encoded", items, of)
    encoded.compute("texts and latents", encoded_by(parts.model, parts.clip, parts.vae, vision))
    unet = parts.model.model.diffusion_model
    learned = len(encoded.load(0)["embedding"]) if vision else None
    torch.manual_seed(0)  # Fresh weights are the same each time, whatever was drawn before.
    start = start_weights(unet, hidden_size, learned, options.start)
    if vision is None:
        print("No --clip-vision: the mapping is not aligned first, it learns by the denoising loss only.", flush=True)
    else:
        plan = Plan(options.alignment_steps * options.batch, options.batch, ALIGNMENT_RATE)
        start = align(start, hidden, encoded, options.out / "alignment", machine, plan)
    plan = Plan(options.steps * options.batch, options.batch, options.rate, parts=options.parts)
    mapping, saving = not options.freeze_mapping, not options.keep_activations
    return train_adapter(start, parts, hidden, encoded, options.out, machine, plan, mapping, saving, options.shown)


def _parts(path: Path, dtype: Any) -> Any:
    """MODEL, CLIP and VAE, by ComfyUI's loader or the small world's; the UNet in this dtype, not streamed."""
    import comfy.sd
    from comfyui_moma.moma_modules.mini.checkpoint import is_mini_checkpoint, load_mini_checkpoint
    from comfyui_moma.training.folder_stage import Parts

    if not path.is_file():
        raise ValueError(f"--checkpoint {path} is not there.")
    if is_mini_checkpoint(path):
        return Parts(path.name, *load_mini_checkpoint(path, dynamic=False))
    try:
        found = comfy.sd.load_checkpoint_guess_config(str(path), model_options={"dtype": dtype}, disable_dynamic=True)
    except Exception as error:  # a broken file makes the reader fail in any way
        raise ValueError(f"--checkpoint {path} is not a checkpoint that ComfyUI loads: {error}") from error
    return Parts(path.name, *found[:3])


def _clip_vision(path: Path | None) -> Any:
    import comfy.clip_vision

    if path is None:
        return None
    found = comfy.clip_vision.load(str(path)) if path.is_file() else None
    if found is None:
        raise ValueError(f"--clip-vision {path} is not an image encoder that ComfyUI loads.")
    return found


def _check_same(options: argparse.Namespace, mllm: str) -> None:
    """See that a folder with a run in it goes on with the same.

    Raises:
        ValueError: It was begun with something else.
    """
    files = {name: getattr(options, name) for name in ("checkpoint", "clip_vision", "start")}
    now = {name: None if path is None or not path.is_file() else _identity(path) for name, path in files.items()}
    now |= {name: getattr(options, name) for name in ("batch", "size", "rate", "freeze_mapping")} | {"mllm": mllm}
    file = options.out / "run.json"
    if not file.is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    before = json.loads(file.read_text("utf-8"))
    other = [name for name, value in now.items() if before.get(name) != value]
    if other:
        option = f"--{other[0].replace('_', '-')}"
        raise ValueError(
            f"--out {options.out} holds a run with another {option}. Go on with that, or name another folder."
        )


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


if __name__ == "__main__":
    main()
