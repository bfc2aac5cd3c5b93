"""MoMA beside IPAdapter_plus itself: its own nodes with a tiny adapter, where its code can be fetched."""

from types import ModuleType
from typing import Any

import pytest
import torch
from peers import peer_pack

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_shortcut, tiny_subject
from workbench.tiny_models import TINY, seeded

EMBEDDING = 24
PLACES = ["input"] * 6 + ["output"] * 9 + ["middle"]
"""IPAdapter numbers the layers in this order."""


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    return peer_pack("cubiq", "ComfyUI_IPAdapter_plus")


def widths() -> list[int]:
    """Of the cross-attention layers, in IPAdapter's order."""
    first, second, third, middle = TINY["block_out_channels"]
    down = [first] * 2 + [second] * 2 + [third] * 2
    up = [third] * 3 + [second] * 3 + [first] * 3
    return [*down, *up, middle]


def ip_weights() -> dict[str, dict[str, torch.Tensor]]:
    """An adapter file's content, for the tiny UNet."""
    context = TINY["cross_attention_dim"]
    layers = {
        f"{2 * number + 1}.to_{kind}_ip.weight": seeded(61, f"{kind} {number}", (width, context)) * context**-0.5
        for number, width in enumerate(widths())
        for kind in "kv"
    }
    projection = {
        "proj.weight": seeded(62, "proj", (4 * context, EMBEDDING)) * EMBEDDING**-0.5,
        "proj.bias": torch.zeros(4 * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    return {"ip_adapter": layers, "image_proj": projection}


def ipadapter(pack: ModuleType, model: Any, **settings: Any) -> Any:
    """IPAdapter Embeds, which needs no image encoder."""
    node = pack.NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]()
    pipeline = {"ipadapter": {"file": None, "model": ip_weights()}, "clipvision": {"file": None, "model": None}}
    settings = {"weight": 0.7, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0, **settings}
    embedding = seeded(63, "embedding", (1, EMBEDDING))
    nothing = torch.zeros_like(embedding)
    return node.apply_ipadapter(model, pipeline, embedding, neg_embed=nothing, embeds_scaling="V only", **settings)[0]


def run(model: Any, subject: Any, steps: int = 3) -> torch.Tensor:
    return sample(model, positive(subject), negative(), steps=steps)


def test_both_orders_give_the_same_picture(pack: ModuleType, model: Any, adapter: Any, subject: Any) -> None:
    alone = moma(model, adapter, subject, shortcut=tiny_shortcut())
    without = run(alone, subject)
    theirs = ipadapter(pack, model)
    after = ipadapter(pack, alone)
    both = run(after, subject)
    assert close(run(moma(theirs, adapter, subject, shortcut=tiny_shortcut()), subject), both, 1e-5)
    assert not close(both, without, 1e-2) and not close(both, run(theirs, subject), 1e-2)
    assert float(masks_of(after, both)[subject.key].std()) > 0.05
    assert torch.equal(run(alone, subject), without), "what IPAdapter added stays with its own MODEL"


def test_its_settings_act_beside_moma(pack: ModuleType, model: Any, adapter: Any, subject: Any) -> None:
    """At weight 0, and outside of its steps, MoMA's picture; with a mask, weight types and twice, another one."""
    alone = moma(model, adapter, subject, shortcut=tiny_shortcut())
    without = run(alone, subject)
    assert close(run(ipadapter(pack, alone, weight=0.0), subject), without, 1e-6)
    assert close(run(ipadapter(pack, alone, start_at=1.0), subject), without, 1e-6)
    full = run(ipadapter(pack, alone), subject)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1.0
    twice = ipadapter(pack, ipadapter(pack, alone), weight=0.3)
    others = [
        ipadapter(pack, alone, attn_mask=left),
        ipadapter(pack, alone, weight_type="style transfer"),
        ipadapter(pack, alone, end_at=0.4),
        twice,
    ]
    for other in others:
        picture = run(other, subject)
        assert not close(picture, full, 1e-3) and not close(picture, without, 1e-3)


def test_a_second_subject_after_it(pack: ModuleType, model: Any, adapter: Any, subject: Any) -> None:
    """MoMA, IPAdapter, MoMA again: as MoMA twice and IPAdapter last."""
    second = tiny_subject(adapter, seed=77)
    first = moma(model, adapter, subject, shortcut=tiny_shortcut())
    between = moma(ipadapter(pack, first), adapter, second)
    last = ipadapter(pack, moma(first, adapter, second))
    assert close(run(between, subject), run(last, subject), 1e-5)
