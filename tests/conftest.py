"""Every test runs against a real ComfyUI, see `bootstrap`."""

from bootstrap import bootstrap

bootstrap()
