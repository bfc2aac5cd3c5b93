"""The MoMA method (arXiv 2404.05674). Only `comfy_bridge` and the model loaders know ComfyUI."""
