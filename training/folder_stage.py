"""Training an adapter for a real model on a user's folder: the mapping first, then all of it by the denoising loss."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moma_modules.adapter.file import AdapterWeights, read_adapter
from ..moma_modules.adapter.networks import Mapping
from ..moma_modules.sampling.unet import attention_layers
from .adapter_stage import FrozenUnet, loss_of
from .adapter_weights import GATES, TrainableAdapter, first_weights, save_adapter
from .loop import Plan, Training, write_whole
from .machine import Machine
from .prepared import Prepared, samples_of
from .validation import Question, answered, sheet

ALIGNMENT_RATE = 1e-4
GATE_RATE = 30.0
"""Of the gates, as a multiple of the plan's rate. At 1e-4 a gate would move 0.1 in a thousand steps."""


@dataclass(frozen=True)
class Parts:
    """ComfyUI's parts of an SD1.5 checkpoint.

    Attributes:
        name: Of the checkpoint, for messages.
    """

    name: str
    model: Any
    clip: Any
    vae: Any


def check_parts(parts: Parts) -> None:
    """Check that a checkpoint is an SD1.5 one.

    Raises:
        ValueError: Naming it and what it is.
    """
    name = f"--checkpoint {parts.name}"
    kind = type(getattr(parts.model.model, "model_config", parts.model.model)).__name__
    try:
        layers = [layer for _, layer in attention_layers(parts.model.model.diffusion_model)]
    except (AttributeError, LookupError, TypeError):
        layers = [None]
    if None in layers or parts.clip is None or parts.vae is None:
        raise ValueError(f"{name} is {kind}; an adapter is trained on a whole SD1.5 checkpoint (UNet, CLIP and VAE).")
    if parts.model.model.model_type.name != "EPS":
        raise ValueError(f"{name} predicts {parts.model.model.model_type.name}; SD1.5 checkpoints predict noise (EPS).")


def start_weights(unet: Any, hidden_size: int, embedding_size: int | None, start: Path | None) -> AdapterWeights:
    """What training starts from: an adapter's file, or fresh weights.

    Args:
        embedding_size: Of what the mapping is to learn; None: 1024, or the file's.

    Raises:
        ValueError: The file is no good, or of other sizes than the models.
    """
    if start is None:
        return first_weights(unet, embedding_size or 1024, hidden_size)
    weights = read_adapter(start)
    fresh = first_weights(unet, embedding_size or weights.sizes.embedding, hidden_size).tensors
    for key, value in weights.tensors.items():
        if value.shape != fresh[key].shape:
            found, needed = tuple(value.shape), tuple(fresh[key].shape)
            raise ValueError(f"--start {start}: {key} has shape {found}; the models that were given need {needed}.")
    return weights


def align(
    start: AdapterWeights, hidden: Prepared, encoded: Prepared, folder: Path, machine: Machine, plan: Plan
) -> AdapterWeights:
    """Stage 1: the mapping learns to give the image embedding of each target; the language model stays as it is."""
    mapping = Mapping(start.sizes.hidden, start.sizes.embedding, None, torch.float32, torch.nn)
    names = {key: f"mapping.{key}" for key in mapping.state_dict()}
    mapping.load_state_dict({key: start.tensors[name] for key, name in names.items()})
    training = Training(mapping, plan, folder, machine.device, accelerator=machine.accelerator)

    def loss(_: int) -> Tensor:
        numbers = torch.randint(0, len(hidden), (plan.batch,)).tolist()
        said, seen = (
            torch.stack([part.load(number)[name] for number in numbers]).to(machine.device)
            for part, name in ((hidden, "hidden"), (encoded, "embedding"))
        )
        with machine.autocast():
            found = mapping(said)
        return (found.float() - seen).square().mean()

    training.run(loss, lambda: None)
    learned = {names[key]: value.cpu() for key, value in training.averaged().items()}
    return replace(start, tensors={**start.tensors, **learned})


def train(
    start: AdapterWeights,
    parts: Parts,
    hidden: Prepared,
    encoded: Prepared,
    folder: Path,
    machine: Machine,
    plan: Plan,
    with_mapping: bool = True,
    saving_memory: bool = True,
    shown: int = 4,
) -> Path:
    """Stage 2: train, or go on, until the plan is fulfilled.

    Args:
        with_mapping: Whether the mapping goes on learning.
        saving_memory: See `FrozenUnet`.
        shown: How many items the sample sheets show.

    Returns:
        The path of the adapter's `.safetensors` form.
    """
    import comfy.model_management

    torch.manual_seed(0)
    model = parts.model.model
    comfy.model_management.load_models_gpu([parts.model], force_full_load=True)
    shares = 1 / (1 + model.model_sampling.sigmas.float() ** 2)
    frozen = FrozenUnet(model.diffusion_model, shares, model.get_dtype_inference(), saving_memory)
    with torch.no_grad():
        nothing = parts.clip.encode_from_tokens(parts.clip.tokenize("")).float().to(machine.device)
    state_folder = folder / "adapter"
    adapter = TrainableAdapter(start, with_mapping)
    training = Training(adapter, plan, state_folder, machine.device, {GATES: GATE_RATE}, machine.accelerator)
    rows = plan.batch // plan.parts
    size = hidden.items[0].size

    def loss(_: int) -> Tensor:
        numbers = torch.randint(0, len(hidden), (rows,)).tolist()
        steps = torch.randint(0, len(shares), (rows,)).to(machine.device)
        samples = samples_of(numbers, hidden, encoded, machine.device)
        with machine.autocast():
            return loss_of(frozen, adapter, samples, steps, nothing)

    def show() -> None:
        file = save_adapter(training.averaged(), state_folder, size, torch.float16)
        numbers = list(range(min(shown, len(hidden))))
        if numbers:
            asked = [_question(hidden, number, size) for number in numbers]
            states = [hidden.load(number)["hidden"][None] for number in numbers]
            pictures = answered(asked, states, file, parts.model, parts.clip, parts.vae, size)
            sheet(state_folder / "samples.png", asked, pictures)
            comfy.model_management.load_models_gpu([parts.model], force_full_load=True)

    training.run(loss, show)
    write_whole(state_folder / "adapter.pt", lambda path: torch.save(training.averaged(), path))
    return save_adapter(training.averaged(), folder, size, torch.float16)


def _question(hidden: Prepared, number: int, size: int) -> Question:
    item = hidden.items[number]
    (picture, mask), (target, _) = item.entry.shown(size, item.variant), item.entry.target(size)
    return Question(
        picture=torch.from_numpy(picture.copy()),
        mask=torch.from_numpy(mask.copy()),
        word=item.entry.word,
        prompt=item.entry.prompt,
        strength=item.entry.strength,
        target=torch.from_numpy(target.copy()).permute(2, 0, 1).float() / 127.5 - 1,
    )
