"""Where our attention patches sit among `patches_replace`: one slot per block, whoever else wants it."""

from typing import Any

from .attention import AttentionPatch, CrossAttentionPatch, SelfAttentionPatch
from .unet import BLOCKS


def fill_slots(options: dict[str, Any], self_attention: bool) -> None:
    """Put our patches in every slot of transformer options that are the caller's own, around what is there.

    On a MODEL when a node is applied, and again on a run's options: nodes that came later may have taken a slot (SAG,
    or packs that do not look at what was there before).

    Args:
        self_attention: Whether the slots of self-attention are wanted too; some packs leave out those that are taken.
    """
    kinds: dict[str, type[AttentionPatch]] = {"attn2": CrossAttentionPatch}
    if self_attention:
        kinds["attn1"] = SelfAttentionPatch
    replacements = options.setdefault("patches_replace", {})
    for kind, patch in kinds.items():
        slots = replacements.setdefault(kind, {})
        for block, place in enumerate(BLOCKS):
            # A replacement registered for the transformer inside the block hides one for the block.
            slot = (*place, 0) if (*place, 0) in slots else place
            if not isinstance(slots.get(slot), patch):
                slots[slot] = patch(block, slots.get(slot))


def has_slots(options: dict[str, Any]) -> bool:
    """Whether any slot of cross-attention still holds a patch of ours."""
    slots = options.get("patches_replace", {}).get("attn2", {})
    return any(isinstance(patch, CrossAttentionPatch) for patch in slots.values())
