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
    replacements = options.setdefault("patches_replace", {})
    for kind, patch in _kinds(self_attention).items():
        slots = replacements.setdefault(kind, {})
        for block, place in enumerate(BLOCKS):
            slot = _slot(slots, place)
            if not isinstance(slots.get(slot), patch):
                slots[slot] = patch(block, slots.get(slot))


def has_slots(options: dict[str, Any]) -> bool:
    """Whether any slot of cross-attention still holds a patch of ours."""
    slots = options.get("patches_replace", {}).get("attn2", {})
    return any(isinstance(patch, CrossAttentionPatch) for patch in slots.values())


def has_all_slots(options: dict[str, Any], self_attention: bool) -> bool:
    """Whether patches of ours are in every slot that `fill_slots` fills."""
    replacements = options.get("patches_replace", {})
    return all(
        isinstance(slots.get(_slot(slots, place)), patch)
        for kind, patch in _kinds(self_attention).items()
        for slots in (replacements.get(kind, {}),)
        for place in BLOCKS
    )


def same_patches(options: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two transformer options replace attention alike, slot by slot; one may be a copy, deep or not."""
    one, other = ({kind: s for kind, s in o.get("patches_replace", {}).items() if s} for o in (options, others))
    return one.keys() == other.keys() and all(
        slots.keys() == other[kind].keys() and all(_same(patch, other[kind][slot]) for slot, patch in slots.items())
        for kind, slots in one.items()
    )


def _same(patch: Any, other: Any) -> bool:
    if isinstance(patch, AttentionPatch) and isinstance(other, AttentionPatch):
        return patch.origin == other.origin
    return patch is other


def _kinds(self_attention: bool) -> dict[str, type[AttentionPatch]]:
    kinds: dict[str, type[AttentionPatch]] = {"attn2": CrossAttentionPatch}
    if self_attention:
        kinds["attn1"] = SelfAttentionPatch
    return kinds


def _slot(slots: dict[Any, Any], place: tuple[str, int]) -> tuple[Any, ...]:
    """A replacement registered for the transformer inside the block hides one for the block."""
    return (*place, 0) if (*place, 0) in slots else place
