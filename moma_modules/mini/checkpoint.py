"""Loading checkpoints: SD1.5's as ComfyUI does, and the small world's, which is SD1.5 in small, in SD1.5's key names.

ComfyUI's own loader finds a UNet's sizes in the file, but knows SD1.5's layout in SD1.5's sizes only, and it builds the
text encoder and the VAE in one size. So its classes are given the sizes here, from the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor

from ..host.weight_files import readable, summary
from .autoencoder import Autoencoder, widths_of

FORMAT = "moma_mini"
"""What the file's metadata says it is."""

TEXT_HEADS, UNET_HEADS = "text_heads", "unet_heads"
"""In the metadata: attention heads of the text encoder and of the UNet, which no shape tells."""

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."
"""How the weights of the parts begin, as in SD1.5's checkpoints."""

SIDE, SD15_SIDE = 128, 512
"""Pixels of the pictures that the small world and SD1.5 learnt to draw."""


_STAND_IN: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds.

    Attributes:
        small: Whether it is of the small world.
    """

    model: Any
    clip: Any
    vae: Any
    small: bool

    @property
    def side(self) -> int:
        """Pixels, across and down, of the pictures that it learnt to draw."""
        return SIDE if self.small else SD15_SIDE


class MiniSD15(comfy.supported_models.SD15):
    """SD1.5 in other sizes."""

    unet_config: ClassVar[dict[str, Any]] = {}


def is_mini_checkpoint(path: Path) -> bool:
    """Whether a file says that it is such a checkpoint."""
    found = summary(path)
    return found is not None and found.format == FORMAT


def load_checkpoint(path: Path, embeddings: list[str]) -> Checkpoint:
    """Load a file of the small world, or any other as ComfyUI's Load Checkpoint does.

    Args:
        embeddings: ComfyUI's folders of textual inversions.

    Raises:
        ValueError: A file of the small world is incomplete.
        RuntimeError: ComfyUI does not know what the file is.
    """
    if is_mini_checkpoint(path):
        return Checkpoint(*load_mini_checkpoint(path, embeddings), small=True)
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=True, output_clip=True, embedding_directory=embeddings
    )[:3]
    return Checkpoint(model, clip, vae, small=False)


def load_mini_checkpoint(path: Path, embeddings: list[str] | None = None, dynamic: bool = True) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of one file, as ComfyUI's own loader gives them.

    Args:
        embeddings: ComfyUI's folders of textual inversions.
        dynamic: Whether MODEL may be of the dynamic kind, where ComfyUI has that on.

    Raises:
        ValueError: The file is unreadable or is no such checkpoint.
    """
    with readable(path):
        weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not MoMA's small checkpoint (its format is {metadata.get('format')!r}). Choose it "
            "in Load MoMA Checkpoint, which loads both kinds."
        )
    missing = [start for start in (UNET, TEXT, VAE) if not any(key.startswith(start) for key in weights)]
    if missing:
        raise ValueError(f"{path} is incomplete: it has no weights that begin with {missing[0]!r}.")
    text = {"clip_l." + key.removeprefix("cond_stage_model."): weights[key] for key in weights if key.startswith(TEXT)}
    vae = {key.removeprefix(VAE): weights[key] for key in weights if key.startswith(VAE)}
    clip = _clip(text, int(metadata[TEXT_HEADS]), embeddings)
    return _model(weights, int(metadata[UNET_HEADS]), dynamic), clip, _vae(vae)


def _model(weights: dict[str, Tensor], heads: int, dynamic: bool) -> Any:
    """As `comfy.sd.load_state_dict_guess_config` does it, with another configuration."""
    config = MiniSD15(comfy.model_detection.detect_unet_config(weights, UNET))
    config.unet_config["num_heads"] = heads
    parameters = comfy.utils.calculate_parameters(weights, UNET)
    device, supported = comfy.model_management.get_torch_device(), list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(weights, UNET)
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    start = comfy.model_management.unet_inital_load_device(parameters, dtype)
    model = config.get_model(weights, UNET, device=start)
    offload = comfy.model_management.unet_offload_device()
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    model.load_model_weights(weights, UNET, assign=patcher.is_dynamic())
    return patcher


def _clip(weights: dict[str, Tensor], heads: int, embeddings: list[str] | None) -> Any:
    config = _text_config(weights, heads)

    def text_model(device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> Any:
        kind, options = comfy.sd1_clip.SDClipModel, model_options or {}
        return comfy.sd1_clip.SD1ClipModel(device, dtype, options, clip_model=kind, textmodel_json_config=config)

    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, text_model),
        embedding_directory=embeddings,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=weights,
    )
    clip.tokenizer.clip_l.embedding_size = config["hidden_size"]
    return clip


def _text_config(weights: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    start = "clip_l.transformer.text_model."
    positions, width = weights[f"{start}embeddings.position_embedding.weight"].shape
    return {
        "num_hidden_layers": _count(weights, rf"{re.escape(start)}encoder\.layers\.(\d+)\."),
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": weights[f"{start}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "max_position_embeddings": positions,
        "eos_token_id": 49407,
    }


def _vae(weights: dict[str, Tensor]) -> Any:
    """ComfyUI's VAE around our autoencoder.

    ComfyUI knows its own kinds only: one of these, as small as may be, settles devices, dtype and sizes, and then gives
    way.
    """
    stand_in = AutoencoderKL(embed_dim=4, ddconfig=dict(_STAND_IN)).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, config={"params": {"embed_dim": 4, "ddconfig": dict(_STAND_IN)}})
    model = Autoencoder(widths_of(weights), comfy.ops.disable_weight_init).eval().to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(model)
    vae.first_stage_model = model
    vae.patcher = type(vae.patcher)(model, load_device=vae.device, offload_device=vae.patcher.offload_device)
    model.load_state_dict(weights, assign=vae.patcher.is_dynamic())
    vae.size = None
    vae.model_size()
    return vae


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers there are in the place of the pattern's group, which counts from 0."""
    return 1 + max((int(found[1]) for key in weights if (found := re.match(pattern, key))), default=-1)
