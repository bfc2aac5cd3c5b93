"""Putting settings, wrappers and attention patches on a clone of a MODEL."""

from typing import Any

from .installed import install, settings_of
from .run import WRAPPERS, outer_sample
from .settings import Settings

__all__ = ["patched", "settings_of"]


def patched(model: Any, settings: Settings) -> Any:
    """A clone of `model` that runs with `settings`; `model` is unchanged.

    Applying settings to a model that has some already replaces them and installs nothing twice.
    """
    clone = model.clone()
    install(clone, settings, outer_sample, WRAPPERS)
    return clone
