"""What our nodes install on a MODEL, and what of it another node has taken away again.

ComfyUI lets every node replace what is on a MODEL. So the start of a run, with its settings, lies on it twice: among
the MODEL's wrappers and in its transformer options. From either the run is made whole again. Attention patches have
one slot for each block, whoever else wants it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..host.messages import warn
from .attention import LOST, AttentionPatch, CrossAttentionPatch, SelfAttentionPatch
from .settings import KEY, Settings
from .unet import BLOCKS

Wrappers = dict[str, Callable[..., Any]]
"""Our wrapper of each kind that a run needs, by ComfyUI's name of the kind."""


@dataclass(frozen=True, eq=False)
class RunStart:
    """The OUTER_SAMPLE wrapper: calls `start(executor, settings, ...)`."""

    start: Callable[..., Any]
    settings: Settings

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """See ComfyUI's OUTER_SAMPLE."""
        return self.start(executor, self.settings, *args, **kwargs)

    def __deepcopy__(self, _: Any) -> "RunStart":
        """Nodes that copy a model's options deeply share it: nothing about it changes."""
        return self


def settings_of(model: Any) -> Settings | None:
    """The MoMA settings on a MODEL, or None if it was not through our nodes."""
    found: Settings | None = model.get_attachment(KEY)
    if found is not None:
        return found
    return next((start.settings for start in _run_starts(model)), None)


def install(clone: Any, settings: Settings, start: Callable[..., Any], wrappers: Wrappers) -> None:
    """Put everything on a MODEL of our own; what was there of ours is replaced."""
    clone.set_attachments(KEY, settings)
    adapters = {id(s.adapter.module): s.adapter.patcher for s in settings.subjects}
    clone.set_additional_models(KEY, list(adapters.values()))
    _lay(clone, RunStart(start, settings))
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    options = clone.model_options["transformer_options"]
    for kind, callback in _CALLBACKS:
        clone.remove_callbacks_with_key(kind, KEY)
        clone.add_callback_with_key(kind, KEY, callback)
    fill_slots(options, settings.has_shortcut)


def _lay(clone: Any, run_start: RunStart) -> None:
    """Put the start of a run in both of its places, for whatever is there of ours."""
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run_start)
    in_options = clone.model_options["transformer_options"].setdefault("wrappers", {})
    in_options.setdefault(WrappersMP.OUTER_SAMPLE, {})[KEY] = [run_start]


def make_whole(patcher: Any, settings: Settings, options: dict[str, Any], wrappers: Wrappers) -> None:
    """Put back into a run's own transformer options what is missing there, and say so.

    Args:
        patcher: The run's MODEL, which is left as it is.
        options: ComfyUI has added the MODEL's wrappers to them.
    """
    missing = [f"the {name}" for name, there in _found_on(patcher) if not there]
    missing += [f"the wrapper {kind}" for kind in put_back(settings, options, wrappers)]
    if missing:
        warn(
            f"MoMA: another node took {', '.join(missing)} of MoMA off this model. For this run all is put back. Apply "
            "MoMA's nodes after BrushNet, PowerPaint and others that replace what is on a model."
        )
    if not patcher.get_callbacks(CallbacksMP.ON_CLONE, KEY):
        warn(
            "MoMA: without its callback the models after that node share MoMA's attention patches: what IPAdapter adds "
            "to one of them acts on the others too. Apply IPAdapter before that node."
        )


def unloaded_adapters(patcher: Any, settings: Settings) -> list[Any]:
    """The adapters that ComfyUI does not load with a run's MODEL, as another node struck them off."""
    here = {id(model.model) for model in patcher.get_additional_models()}
    adapters = {id(s.adapter.module): s.adapter.patcher for s in settings.subjects}
    return [adapter for adapter in adapters.values() if id(adapter.model) not in here]


def is_whole(settings: Settings, options: dict[str, Any], wrappers: Wrappers) -> bool:
    """Whether an evaluation's transformer options still hold what of ours acts within an evaluation."""
    kinds = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
    return has_all_slots(options, settings.has_shortcut) and all(_has(options, kind, wrappers[kind]) for kind in kinds)


def put_back(settings: Settings, options: dict[str, Any], wrappers: Wrappers) -> list[str]:
    """Put wrappers and slots back into transformer options that are the run's own; returns the missing kinds."""
    missing = [kind for kind, wrapper in wrappers.items() if not _has(options, kind, wrapper)]
    for kind in missing:
        options.setdefault("wrappers", {}).setdefault(kind, {})[KEY] = [wrappers[kind]]
    # Nodes that came later may have taken a slot for good reason: this one is no loss.
    fill_slots(options, settings.has_shortcut)
    return missing


def _has(options: dict[str, Any], kind: str, wrapper: Callable[..., Any]) -> bool:
    return wrapper in options.get("wrappers", {}).get(kind, {}).get(KEY, ())


def _found_on(patcher: Any) -> Iterator[tuple[str, bool]]:
    """The parts that lie on the MODEL alone, and whether they are there."""
    options = patcher.model_options.get("transformer_options", {})
    outer = WrappersMP.OUTER_SAMPLE
    yield "settings", patcher.get_attachment(KEY) is not None
    yield "adapter", bool(patcher.get_additional_models_with_key(KEY))
    yield f"wrapper {outer}", bool(patcher.get_wrappers(outer, KEY))
    yield "start in the transformer options", bool(options.get("wrappers", {}).get(outer, {}).get(KEY))
    yield "attention patches", has_slots(options)
    for kind, _ in _CALLBACKS:
        yield f"callback {kind}", bool(patcher.get_callbacks(kind, KEY))


def _run_starts(patcher: Any) -> Iterator[RunStart]:
    options = patcher.model_options.get("transformer_options", {})
    for by_kind in (patcher.wrappers, options.get("wrappers", {})):
        for wrappers in by_kind.get(WrappersMP.OUTER_SAMPLE, {}).values():
            yield from (wrapper for wrapper in wrappers if isinstance(wrapper, RunStart))


def _check_start(patcher: Any) -> None:
    """ON_PRE_RUN: a run that did not begin with ours would go on without MoMA."""
    if not any(True for _ in _run_starts(patcher)):
        raise ValueError(LOST)


def _own_patches(_: Any, clone: Any) -> None:
    """ON_CLONE: ComfyUI's clones share patch objects; ours can be added to, so each clone gets its own."""
    for slots in clone.model_options["transformer_options"].get("patches_replace", {}).values():
        for place, patch in slots.items():
            if isinstance(patch, AttentionPatch):
                slots[place] = patch.copy()


def _own_adapters(original: Any, clone: Any) -> None:
    """A MODEL for another device (Select Model Device): ComfyUI made its adapters anew for that device; use these."""
    before, made = (model.get_additional_models_with_key(KEY) for model in (original, clone))
    patchers = {id(old.model): new for old, new in zip(before, made, strict=True)}
    for run_start in [*_run_starts(clone)][:1]:
        subjects = tuple(
            replace(
                entry,
                adapter=replace(entry.adapter, patcher=patchers.get(id(entry.adapter.module), entry.adapter.patcher)),
            )
            for entry in run_start.settings.subjects
        )
        settings = replace(run_start.settings, subjects=subjects)
        clone.set_attachments(KEY, settings)
        _lay(clone, RunStart(run_start.start, settings))


_ON_ANOTHER_DEVICE = "on_deepclone_multigpu"
"""`CallbacksMP.ON_DEEPCLONE_MULTIGPU`, which older versions of ComfyUI do not have."""

_CALLBACKS = (
    (CallbacksMP.ON_CLONE, _own_patches),
    (CallbacksMP.ON_PRE_RUN, _check_start),
    (_ON_ANOTHER_DEVICE, _own_adapters),
)


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
