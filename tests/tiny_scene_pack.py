"""A custom node pack for test servers: the tiny models as nodes, and what a test must do inside of the server."""

from pathlib import Path

from workbench import ROOT

SOURCE = f'''
import gc
import sys

sys.path.append({str(ROOT)!r})


class TinyModels:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{}}}})
    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load"

    def load(self):
        import comfy.taesd.taesd
        from comfy.sd import VAE
        from workbench.tiny_models import seeded_weight, tiny_clip, tiny_model

        shapes = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
        vae = VAE(sd={{name: seeded_weight(91, name, tuple(weight.shape)) for name, weight in shapes.items()}})
        return tiny_model(), tiny_clip(), vae


class ForgetModels:
    """What ComfyUI's cache does first when memory runs short: lets go of every result with a patcher in it."""

    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"number": ("INT", {{}})}}}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "forget", True

    def forget(self, number):
        from comfy.model_patcher import ModelPatcher
        from comfy_execution.caching import LRUCache

        kinds = set()
        for cache in [item for item in gc.get_objects() if isinstance(item, LRUCache)]:
            for key, entry in list(cache.cache.items()):
                held = [value for output in entry.outputs or () for value in output]
                patchers = [value for part in held for value in (part, getattr(part, "patcher", None))]
                if any(isinstance(value, ModelPatcher) for value in patchers):
                    kinds |= {{type(value).__name__ for value in held}}
                    del cache.cache[key]
        return {{"ui": {{"text": [" ".join(sorted(kinds))]}}}}


class Seeds:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"count": ("INT", {{}})}}}})
    RETURN_TYPES, FUNCTION, OUTPUT_IS_LIST = ("INT",), "list", (True,)

    def list(self, count):
        return (list(range(count)),)


class Twice:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"value": ("MOMA_SUBJECT",)}}}})
    RETURN_TYPES, FUNCTION, OUTPUT_IS_LIST = ("MOMA_SUBJECT",), "twice", (True,)

    def twice(self, value):
        return ([value, value],)


class First:
    """The first of a list of latents."""

    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"latents": ("LATENT",)}}}})
    RETURN_TYPES, FUNCTION, INPUT_IS_LIST = ("LATENT",), "first", True

    def first(self, latents):
        return (latents[0],)


NODE_CLASS_MAPPINGS = {{node.__name__: node for node in (TinyModels, ForgetModels, Seeds, Twice, First)}}
'''


def add_tiny_scene_pack(base: Path) -> None:
    """Put the pack into a server's folder before it starts."""
    folder = base / "custom_nodes" / "tiny_scene"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(SOURCE, encoding="utf-8")
