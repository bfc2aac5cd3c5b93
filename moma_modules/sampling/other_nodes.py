"""What other nodes put on the same MODEL: refused before a run where it needs a decision, and named in messages."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

from comfy.patcher_extension import WrappersMP

from .attention import AttentionPatch
from .settings import Settings
from .unet import attention_layers

_REARRANGING = {"nodes_hypertile": "HyperTile", "nodes_tomesd": "Token Merging (TomePatchModel)"}
"""ComfyUI's own nodes that re-order self-attention's tokens: the end of their patches' module, and their names."""


_TILING = "AbstractDiffusion"
"""What all wrappers of the pack TiledDiffusion derive from."""

_COUPLE = "couple"
"""In the module names of all packs that give each region rows of its own: attention couple."""

_OURS = __name__.partition(".moma_modules.")[0]
_STOCK = {"comfy", "comfy_extras", "comfy_api", "torch", "builtins"}
"""What ComfyUI itself is made of, by the first name of a module."""


def check_other_nodes(patcher: Any, settings: Settings, options: dict[str, Any]) -> None:
    """Refuse what would fail inside the first step or give a wrong picture.

    Args:
        patcher: The run's MODEL.
        options: The run's transformer options.

    Raises:
        ValueError: Naming the node and what to do.
    """
    if patcher.get_additional_models_with_key("multigpu"):
        raise ValueError("MoMA does not work with MultiGPU work units: remove that node from this model.")
    wrapper = patcher.model_options.get("model_function_wrapper")
    if any(base.__name__ == _TILING for base in type(wrapper).__mro__):
        raise ValueError(
            "MoMA: TiledDiffusion on this model cuts the picture into tiles, and MoMA must know where each is. Remove "
            "TiledDiffusion or MoMA."
        )
    _check_couple(options.get("patches", {}))
    shortcuts = [entry.shortcut for entry in settings.subjects]
    if not any(shortcut is not None and shortcut.strength != 0 for shortcut in shortcuts):
        return
    for patch in options.get("patches", {}).get("attn1_patch", ()):
        module = _module(patch)
        name = next((name for end, name in _REARRANGING.items() if module.endswith(end)), None)
        if name is not None:
            raise ValueError(
                f"MoMA: {name} on this model re-arranges the tokens of self-attention, and Self-Attn Shortcut must "
                f"know their places. Remove {name} or Self-Attn Shortcut; Apply MoMA Adapter alone works with it."
            )


def check_prompts(conds: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse patches that come with a run's prompts, through ComfyUI's hooks.

    Raises:
        ValueError: Naming the pack and what to do.
    """
    for cond in chain.from_iterable(part or () for part in conds.values()):
        for hook in getattr(cond.get("hooks"), "hooks", ()):
            _check_couple((getattr(hook, "transformers_dict", None) or {}).get("patches", {}))


def check_layers(unet: Any) -> None:
    """Check that the UNet's attention, as it is now that ComfyUI has loaded it, goes through our patches.

    Raises:
        ValueError: Another node put in layers of its own, which do without.
    """
    for name, layer in attention_layers(unet):
        lacking = [part for part in ("to_q", "to_k", "to_v", "to_out") if not hasattr(layer, part)]
        if lacking:
            kind = type(layer)
            raise ValueError(
                f"MoMA: another node replaced the UNet's attention layer {name} by {kind.__name__} of "
                f"{_pack(kind.__module__)}, which has no {', '.join(lacking)}: there is no place for the subject's "
                "features in it. LayerDiffuse does that on SD1.5. Remove that node, or MoMA."
            )


def others_on_model(patcher: Any, model_options: dict[str, Any]) -> str:
    """Whose code is on a run's model, as a sentence for messages; empty if there is none but ComfyUI's and ours.

    Args:
        patcher: The run's MODEL.
        model_options: The run's.
    """
    modules = {_module(part) for part in _parts(patcher, model_options)}
    packs = {_pack(module) for module in modules if not _is_stock(module)} - {_pack(_OURS)}
    return f" Others on this model: {', '.join(sorted(packs))}." if packs else ""


def _parts(patcher: Any, model_options: dict[str, Any]) -> Iterator[Any]:
    """Everything that others can put on a model and that acts during a forward or an evaluation."""
    options = model_options["transformer_options"]
    for kind in vars(WrappersMP).values():
        if isinstance(kind, str):
            yield from chain.from_iterable(options.get("wrappers", {}).get(kind, {}).values())
    yield from chain.from_iterable(options.get("patches", {}).values())
    for slots in options.get("patches_replace", {}).values():
        for patch in slots.values():
            yield from _in_slot(patch)
    for value in model_options.values():
        if callable(value):
            yield getattr(value, "previous", value)
        elif isinstance(value, list):
            yield from filter(callable, value)
    yield from patcher.object_patches.values()


def _in_slot(patch: Any) -> Iterator[Any]:
    """Whoever acts in a slot of attention: our patch calls what sat there before, and what others add."""
    if not isinstance(patch, AttentionPatch):
        yield patch
        return
    if patch.previous is not None:
        yield from _in_slot(patch.previous)
    yield from (callback for callback, _ in patch.added)


def _check_couple(patches: dict[str, list[Any]]) -> None:
    for patch in patches.get("attn2_patch", ()):
        if _COUPLE in _module(patch).lower():
            raise ValueError(
                f"MoMA: the attention couple of {_pack(_module(patch))} on this run gives every region rows of its own "
                "in cross-attention, and MoMA must know what each row is. Remove it, or MoMA; regions of ComfyUI's own "
                "(Conditioning Set Area, Set Mask) and region_mask work."
            )


def _module(part: Any) -> str:
    """The name of the module that a function or an object comes from."""
    if isinstance(part, partial):
        part = part.func
    found = getattr(part, "__module__", None) or type(part).__module__
    return str(found)


def _is_stock(module: str) -> bool:
    """Whether a module is ComfyUI's own; it names its own nodes by their files."""
    *folders, name = re.split(r"[\\/]", module)
    return (folders[-1] if folders else name.partition(".")[0]) in _STOCK


def _pack(module: str) -> str:
    """A pack's folder: ComfyUI names a pack's modules by its path, with the dots replaced."""
    return re.split(r"[\\/]", module)[-1].partition(".")[0].replace("_x_", ".")
