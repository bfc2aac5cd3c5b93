"""ComfyUI-MoMA: images of one subject from one photo, a word and a prompt (MoMA, arXiv 2404.05674)."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
