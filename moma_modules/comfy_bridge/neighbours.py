"""Other nodes on the same MODEL that need a decision before a run starts."""

from typing import Any

from .settings import Settings

_REARRANGING = {"nodes_hypertile": "HyperTile", "nodes_tomesd": "Token Merging (TomePatchModel)"}
"""ComfyUI's own nodes that re-order self-attention's tokens: the end of their patches' module, and their names."""


_TILING = "AbstractDiffusion"
"""What all wrappers of the pack TiledDiffusion derive from."""


def check_neighbours(patcher: Any, settings: Settings, options: dict[str, Any]) -> None:
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
    shortcuts = [entry.shortcut for entry in settings.subjects]
    if not any(shortcut is not None and shortcut.strength != 0 for shortcut in shortcuts):
        return
    for patch in options.get("patches", {}).get("attn1_patch", ()):
        module = getattr(patch, "__module__", "")
        name = next((name for end, name in _REARRANGING.items() if module.endswith(end)), None)
        if name is not None:
            raise ValueError(
                f"MoMA: {name} on this model re-arranges the tokens of self-attention, and Self-Attn Shortcut must "
                f"know their places. Remove {name} or Self-Attn Shortcut; Apply MoMA Adapter alone works with it."
            )
