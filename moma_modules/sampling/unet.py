"""The SD1.5 UNet's attention layers: where they are, and whether a model has them."""

from collections.abc import Iterator
from typing import Any

from ..adapter.loading import BELONG_TOGETHER, Adapter

BLOCKS: tuple[tuple[str, int], ...] = (
    *(("input", i) for i in (1, 2, 4, 5, 7, 8)),
    *(("output", i) for i in range(3, 12)),
    ("middle", 0),
)
"""Blocks with attention in the adapter's order: block j has self-attention layer 2j, cross-attention layer 2j + 1."""


def check_model(model: Any, adapter: Adapter) -> None:
    """Check that a MODEL is a UNet of SD1.5's layout whose layers fit the adapter.

    Raises:
        ValueError: Naming the input, what the model is and what to do.
    """
    name = type(getattr(model.model, "model_config", model.model)).__name__
    try:
        sizes, context = _layer_sizes(model.model.diffusion_model)
    except LookupError as error:
        raise ValueError(
            f"model is {name}; MoMA's adapter works with SD1.5 checkpoints only ({error}). Load an SD1.5 checkpoint."
        ) from error
    if context != adapter.sizes.context:
        raise ValueError(
            f"model is {name} with text embeddings of size {context}; the adapter {adapter.name} was made for size "
            f"{adapter.sizes.context}. {BELONG_TOGETHER}"
        )
    if sizes != adapter.sizes.layers:
        layer = next(i for i in range(len(sizes)) if sizes[i] != adapter.sizes.layers[i])
        raise ValueError(
            f"model is {name}; its attention layer {layer} has {sizes[layer]} channels, the adapter {adapter.name} "
            f"has {adapter.sizes.layers[layer]}. {BELONG_TOGETHER}"
        )


def attention_layers(unet: Any) -> Iterator[tuple[str, Any]]:
    """The 32 attention layers of an SD1.5 UNet as they are now, with their names for messages."""
    for name, number in BLOCKS:
        transformer = _transformer(_blocks(unet, name)[number])
        for kind in ("attn1", "attn2"):
            yield f"{kind} of {name} block {number}", getattr(transformer.transformer_blocks[0], kind, None)


def _layer_sizes(unet: Any) -> tuple[tuple[int, ...], int]:
    """Channels of the 32 attention layers in the adapter's order, and the size of the text embedding."""
    modules = {
        (name, i): _transformer(block)
        for name in ("input", "middle", "output")
        for i, block in enumerate(_blocks(unet, name))
    }
    found = {place for place, transformer in modules.items() if transformer is not None}
    if found != set(BLOCKS):
        raise LookupError("its attention layers are elsewhere")
    sizes: list[int] = []
    context = 0
    for place in BLOCKS:
        blocks = modules[place].transformer_blocks
        if len(blocks) != 1 or getattr(blocks[0], "attn2", None) is None:
            raise LookupError("it has several transformer layers in a block")
        sizes += [blocks[0].attn1.to_k.out_features, blocks[0].attn2.to_k.out_features]
        context = blocks[0].attn2.to_k.in_features
    return tuple(sizes), context


def _blocks(unet: Any, name: str) -> list[Any]:
    blocks = getattr(unet, f"{name}_block" if name == "middle" else f"{name}_blocks", None)
    if blocks is None:
        raise LookupError("it is not a UNet")
    # The middle block is one sequence of layers, the others are lists of such.
    return [blocks] if name == "middle" else list(blocks)


def _transformer(block: Any) -> Any:
    found = [layer for layer in block if hasattr(layer, "transformer_blocks")]
    return found[0] if found else None
