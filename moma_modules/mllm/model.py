"""The MLLM as a module in ComfyUI's memory management.

The architectures are transformers' own LLaMA and CLIP; their leaves are replaced with ComfyUI's, which cast and move
weights as they compute. Weights stay in the memory-mapped pages of the files, where possible, or are packed smaller.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import Linear
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from .checkpoint import Checkpoint, read_checkpoint
from .identity import checkpoint_identity
from .leaves import CastLinear, PackingLinear, RowScaledLinear, comfy_leaf
from .precision import PACKED, Plan, is_language_matrix, make_plan
from .quantize import QUANTIZED_DTYPES, SCALE_SUFFIX
from .shapes import LanguageShape, VisionShape


class MllmModule(nn.Module):
    """Vision tower, projector and language model. A plain module: transformers' own has a read-only `device`."""

    def __init__(self, language: LanguageShape, vision: VisionShape) -> None:
        """Build the structure, of torch's own leaves and without memory; `fill` completes it."""
        super().__init__()
        with torch.device("meta"):
            self.language = LlamaModel(_llama_config(language))
            tower = CLIPVisionModel(_clip_config(vision))
            self.vision = getattr(tower, "vision_model", tower)  # transformers 5 dropped the inner module
            self.projector = nn.Sequential(
                Linear(vision.width, language.hidden_size),
                nn.GELU(),
                Linear(language.hidden_size, language.hidden_size),
            )
        self.vision.post_layernorm = nn.Identity()  # belongs to the pooled output, which LLaVA does not use
        self.requires_grad_(False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, S] to [1, patches, hidden]: patch features of the layer LLaVA selects, projected."""
        self._bring_strays(pixels.device)
        return self.projector(self.vision(pixels).last_hidden_state[:, 1:])

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [1, L] to embeddings [1, L, hidden], in the dtype of the weights."""
        return self.language.embed_tokens(ids)

    def last_hidden_state(self, embeddings: Tensor) -> Tensor:
        """[1, L, hidden] to [1, hidden]: the last token after the final norm."""
        self._bring_strays(embeddings.device)
        return self.language(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]

    def layers(self) -> list[nn.Module]:
        """All transformer layers in the order they run, for progress."""
        return [*self.vision.encoder.layers, *self.language.layers]

    def _bring_strays(self, device: torch.device) -> None:
        """Norm weights, the class embedding and constant buffers are no leaves of ComfyUI's: they follow the input."""
        for module in self.modules():
            if hasattr(module, "comfy_cast_weights"):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device != device:
                    setattr(module, name, nn.Parameter(parameter.to(device), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


@dataclass(frozen=True, eq=False)
class LoadedMllm:
    """The weights of an MLLM, shared by all that name it; freed when nothing does any more.

    Attributes:
        patcher: Holds the `MllmModule`; ComfyUI loads and offloads it.
        plan: How it is kept and computed.
    """

    patcher: comfy.model_patcher.ModelPatcher
    plan: Plan

    @property
    def module(self) -> MllmModule:
        """The module. Compute with it only while the patcher is loaded."""
        return self.patcher.model


_LOADED: WeakValueDictionary[tuple[str, Plan], LoadedMllm] = WeakValueDictionary()
"""What is loaded now, by identity and plan; keeps nothing alive."""


@dataclass(frozen=True, eq=False)
class Mllm:
    """A checked MLLM, whose weights are read when they are first needed: what the nodes pass on as MOMA_MLLM.

    Attributes:
        path: The checkpoint.
        name: Its name in messages.
        identity: Content hash, see `checkpoint_identity`.
        precision: As chosen at the node.
        plan: What that means for this file on this machine.
        hidden_size: Size of a hidden state (4096 in the released checkpoint).
        image_size: Side of the vision tower's input (336).
        vision_heads: See `read_checkpoint`.
    """

    path: Path
    name: str
    identity: str
    precision: str
    plan: Plan
    hidden_size: int
    image_size: int
    tokenizer: SentencePieceProcessor
    vision_heads: int | None

    @cached_property
    def loaded(self) -> LoadedMllm:
        """The weights, read (with progress) unless another handle of the same content and plan has them."""
        key = (self.identity, self.plan)
        found = _LOADED.get(key)
        if found is None:
            logging.info("MoMA MLLM %s: %s", self.name, self.plan.summary)
            found = load_checkpoint(read_checkpoint(self.path, self.vision_heads), self.plan, mllm_device())
            _LOADED[key] = found
        return found

    def leave_device(self) -> None:
        """Take the weights off the device, as ComfyUI does for want of room; does nothing where none are loaded."""
        loaded = _LOADED.get((self.identity, self.plan))
        if loaded is None:
            return
        others = [m for m in comfy.model_management.current_loaded_models if m.model is not loaded.patcher]
        comfy.model_management.free_memory(1e30, loaded.patcher.load_device, keep_loaded=others)


def mllm_device() -> torch.device:
    """Where MLLMs compute: also with --lowvram, which puts text encoders on the CPU, as streaming 7B is far faster."""
    return comfy.model_management.get_torch_device()


def load_mllm(path: Path, precision: str = "auto", vision_heads: int | None = None) -> Mllm:
    """Check a LLaVA checkpoint and plan how to run it, without reading its weights.

    Args:
        precision: One of `PRECISIONS`.
        vision_heads: See `read_checkpoint`.

    Raises:
        ValueError: See `read_checkpoint` and `make_plan`; also a weight that is missing, unknown or of a wrong shape.
    """
    checkpoint = read_checkpoint(path, vision_heads)
    weights = _checked_weights(checkpoint, MllmModule(checkpoint.language_shape, checkpoint.vision_shape))
    return Mllm(
        path=path,
        name=checkpoint.name,
        identity=checkpoint_identity(path),
        precision=precision,
        plan=make_plan(precision, weights, mllm_device()),
        hidden_size=checkpoint.language_shape.hidden_size,
        image_size=checkpoint.vision_shape.image_size,
        tokenizer=checkpoint.tokenizer,
        vision_heads=vision_heads,
    )


def load_checkpoint(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> LoadedMllm:
    """Put weights into ComfyUI's memory management, packed as planned.

    Shows progress and can be cancelled at each weight; then nothing is left.

    Args:
        device: Where it will compute.
    """
    module = MllmModule(checkpoint.language_shape, checkpoint.vision_shape)
    weights = _checked_weights(checkpoint, module)
    use_comfy_leaves(module, plan.storage, {key for key in weights if key.endswith(SCALE_SUFFIX)})
    progress = comfy.utils.ProgressBar(len(weights))
    for key in list(weights):
        comfy.model_management.throw_exception_if_processing_interrupted()
        _fill(module, key, weights, plan.compute_dtype)
        progress.update(1)
    _fill_constants(module, checkpoint.language_shape)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
    )
    return LoadedMllm(patcher, plan)


def use_comfy_leaves(module: MllmModule, storage: str | None, scale_keys: set[str]) -> None:
    """Replace torch's leaves by ComfyUI's of the same size.

    Args:
        storage: What the matrices of the language model become, see `Plan`.
        scale_keys: Names of the scales in the file: what has one is packed there already.
    """
    for parent_name, parent in list(module.named_modules()):
        for name, leaf in list(parent.named_children()):
            key = f"{parent_name}.{name}.weight"
            linear: type[CastLinear] = CastLinear
            if key + SCALE_SUFFIX in scale_keys:
                linear = RowScaledLinear
            elif storage is not None and is_language_matrix(key):
                linear = PACKED[storage]
            replacement = comfy_leaf(leaf, linear)
            if replacement is not None:
                setattr(parent, name, replacement)


def _fill(module: MllmModule, key: str, weights: dict[str, Tensor], compute_dtype: torch.dtype) -> None:
    """Give one weight to its leaf. Assigned, not copied: a matrix in the file's dtype needs no memory."""
    owner_name, _, name = key.rpartition(".")
    owner, tensor = module.get_submodule(owner_name), weights[key]
    parts = {name: tensor}
    if name == "weight" and isinstance(owner, PackingLinear):
        packed, scale = owner.pack(tensor)
        parts = {"weight": packed, "weight" + SCALE_SUFFIX: scale}
    elif not isinstance(owner, (Linear, nn.Embedding)):
        parts = {name: tensor.to(compute_dtype)}  # all but the matrices are a few thousand values
    for part, value in parts.items():
        setattr(owner, part, nn.Parameter(value, requires_grad=False))


def _llama_config(shape: LanguageShape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=4096,
        hidden_act="silu",
    )


def _clip_config(shape: VisionShape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


def _checked_weights(checkpoint: Checkpoint, module: MllmModule) -> dict[str, Tensor]:
    """All weights by their names in `module`, whose leaves are still torch's own.

    Raises:
        ValueError: A weight is missing, has no place, or is of a wrong shape or dtype.
    """
    weights = dict(_prefixed(checkpoint))
    expected = module.state_dict()
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ValueError(f"MLLM {checkpoint.name} is incomplete: weight {missing[0]!r} is missing.")
    for key, tensor in weights.items():
        owner = key.removesuffix(SCALE_SUFFIX)
        if owner not in expected:
            raise ValueError(f"MLLM {checkpoint.name}: weight {key!r} has no place in a LLaVA-1.5 model.")
        shape = tuple(expected[owner].shape)
        if key != owner:
            fits, wanted = tensor.shape == shape[:1] and tensor.is_floating_point(), f"scales {shape[:1]}"
        elif key + SCALE_SUFFIX in weights:
            fits, wanted = tensor.shape == shape and tensor.dtype in QUANTIZED_DTYPES, f"fp8 or int8 {shape}"
        else:
            fits = tensor.shape == shape and tensor.is_floating_point() and tensor.dtype.itemsize > 1
            wanted = f"a floating-point one of shape {shape}"
        if not fits:
            raise ValueError(
                f"MLLM {checkpoint.name}: weight {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted}."
            )
    return weights


def _prefixed(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in ("language", "vision", "projector"):
        for key, value in getattr(checkpoint, name).items():
            yield f"{name}.{key}", value


def _fill_constants(module: MllmModule, shape: LanguageShape) -> None:
    """Buffers that no file holds: rotary frequencies (RoFormer, arXiv 2104.09864) and position numbers."""
    head = shape.hidden_size // shape.heads
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, head, 2).float() / head)
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if name in ("inv_freq", "original_inv_freq"):
                setattr(owner, name, frequencies.clone())
            elif name == "position_ids":
                setattr(owner, name, torch.arange(buffer.shape[-1])[None])
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    if left:
        raise RuntimeError(f"This version of transformers has a constant that the pack does not know: {left[0]}.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
