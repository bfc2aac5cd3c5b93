"""Putting settings, wrappers and attention patches on a clone of a MODEL."""

from dataclasses import replace
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP

from . import run
from .attention import AttentionPatch
from .settings import KEY, Settings
from .slots import fill_slots

_WRAPPERS = (
    (WrappersMP.OUTER_SAMPLE, run.outer_sample),
    (WrappersMP.SAMPLER_SAMPLE, run.sampler_sample),
    (WrappersMP.PREDICT_NOISE, run.predict_noise),
    (WrappersMP.CALC_COND_BATCH, run.calc_cond_batch),
    (WrappersMP.APPLY_MODEL, run.apply_model),
)

_ON_ANOTHER_DEVICE = "on_deepclone_multigpu"
"""`CallbacksMP.ON_DEEPCLONE_MULTIGPU`, which older versions of ComfyUI do not have."""


def settings_of(model: Any) -> Settings | None:
    """The MoMA settings on a MODEL, or None if it was not through our nodes."""
    return model.get_attachment(KEY)


def patched(model: Any, settings: Settings) -> Any:
    """A clone of `model` that runs with `settings`; `model` is unchanged.

    Applying settings to a model that has some already replaces them and installs nothing twice.
    """
    clone = model.clone()
    clone.set_attachments(KEY, settings)
    adapters = {id(s.adapter.module): s.adapter.patcher for s in settings.subjects}
    clone.set_additional_models(KEY, list(adapters.values()))
    for kind, wrapper in _WRAPPERS:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _own_patches)
    clone.remove_callbacks_with_key(_ON_ANOTHER_DEVICE, KEY)
    clone.add_callback_with_key(_ON_ANOTHER_DEVICE, KEY, _own_adapters)
    fill_slots(clone.model_options["transformer_options"], settings.has_shortcut)
    return clone


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
    settings = settings_of(clone)
    if settings is not None:
        subjects = tuple(
            replace(entry, adapter=replace(entry.adapter, patcher=patchers[id(entry.adapter.module)]))
            for entry in settings.subjects
        )
        clone.set_attachments(KEY, replace(settings, subjects=subjects))
