"""MoMA beside nodes that change how attention is computed: who shares a slot, who is refused."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel
from comfyui_moma.moma_modules.sampling import run as run_module
from comfyui_moma.moma_modules.sampling.forward import Forward
from comfyui_moma.moma_modules.sampling.other_nodes import others_on_model
from comfyui_moma.moma_modules.sampling.unet import BLOCKS
from compat_rows import message
from torch.overrides import TorchFunctionMode

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_shortcut
from workbench.tiny_models import seeded


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 2, **kwargs})


class Slot:
    """A replacement as IPAdapter_plus leaves it: attention, then what was added, each within its noise range."""

    def __init__(self, callback: Callable[..., torch.Tensor], **kwargs: Any) -> None:
        self.callbacks = [(callback, kwargs)]

    def add(self, callback: Callable[..., torch.Tensor], **kwargs: Any) -> None:
        self.callbacks.append((callback, kwargs))

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        sigma = float(extra_options["sigmas"][0])
        for callback, kwargs in self.callbacks:
            if kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def image_prompt(out: Any, q: Any, k: Any, v: Any, extra_options: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """What IPAdapter adds: attention to tokens of its own, by the rows' kinds."""
    width = q.shape[2]
    tokens = torch.stack([seeded(31 + kind, f"ip {width}", (4, width)) for kind in extra_options["cond_or_uncond"]])
    tokens = tokens.repeat_interleave(q.shape[0] // len(tokens), dim=0)
    return kwargs["weight"] * optimized_attention(q, tokens, tokens, extra_options["n_heads"])


@pytest.mark.parametrize("before", [True, False])
def test_who_shares_a_slot_is_among_the_others(
    model: Any, adapter: Any, subject: Any, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Within our patch as well; ComfyUI's own nodes, loaded from their files, are not."""
    for part, module in ((Slot, "/comfyui/custom_nodes/TakesTheSlot.ip"), (image_prompt, "/comfyui/custom_nodes/Adds")):
        monkeypatch.setattr(part, "__module__", module)

    def stock(args: dict[str, Any]) -> Any:
        return args["denoised"]

    stock.__module__ = "/comfyui/comfy_extras/nodes_pag"
    full = moma(ipadapter(model), adapter, subject) if before else ipadapter(moma(model, adapter, subject))
    full.set_model_sampler_post_cfg_function(stock)
    full.set_model_sampler_post_cfg_function(HyperTile.execute)
    name = "TakesTheSlot" if before else "Adds"
    assert others_on_model(full, full.model_options) == f" Others on this model: {name}."


def ipadapter(model: Any, weight: float = 0.7) -> Any:
    """A clone with an image prompt on every cross-attention: set where a slot is free, `add` where it is taken."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    slots = options.setdefault("patches_replace", {}).setdefault("attn2", {})
    kwargs = {"weight": weight, "sigma_start": 1e9, "sigma_end": 0.0}
    for place in BLOCKS:
        if place in slots:
            slots[place].add(image_prompt, **kwargs)
        else:
            slots[place] = Slot(image_prompt, **kwargs)
    return clone


def test_ipadapter_before_and_after(model: Any, adapter: Any, subject: Any) -> None:
    """Both orders give the same picture, which is neither's alone; two image prompts around MoMA work too."""
    alone = moma(model, adapter, subject, shortcut=tiny_shortcut())
    before = moma(ipadapter(model), adapter, subject, shortcut=tiny_shortcut())
    after = ipadapter(alone)
    both = run(after, subject)
    assert close(run(before, subject), both, 1e-5)
    for other in (alone, ipadapter(model)):
        assert not close(both, run(other, subject), 1e-2)
    around = ipadapter(before, 0.4)
    assert close(run(around, subject), run(ipadapter(after, 0.4), subject), 1e-5)
    assert not close(run(around, subject), both, 1e-2)
    assert close(run(before, subject), both, 1e-5), "adding to a clone must leave the model before it alone"


def test_ipadapter_off_changes_nothing(model: Any, adapter: Any, subject: Any) -> None:
    alone = moma(model, adapter, subject, shortcut=tiny_shortcut())
    for other in (ipadapter(alone, 0.0), moma(ipadapter(model, 0.0), adapter, subject, shortcut=tiny_shortcut())):
        assert close(run(other, subject), run(alone, subject), 1e-6)


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
@pytest.mark.parametrize("index", [None, 0])
def test_who_takes_our_slot_does_not_take_our_place(
    model: Any, adapter: Any, subject: Any, slot: str, index: int | None
) -> None:
    """A replacement without `add`, before or after our nodes, for the block or the transformer in it: one picture."""

    def halved(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        return 0.5 * optimized_attention(q, k, v, extra_options["n_heads"])

    def others(candidate: Any) -> Any:
        clone = candidate.clone()
        for place in BLOCKS:
            getattr(clone, f"set_model_{slot}_replace")(halved, *place, index)
        return clone

    alone = moma(model, adapter, subject, shortcut=tiny_shortcut())
    expected = run(moma(others(model), adapter, subject, shortcut=tiny_shortcut()), subject)
    assert torch.equal(run(others(alone), subject), expected)
    assert not close(expected, run(alone, subject), 1e-2) and not close(expected, run(others(model), subject), 1e-2)


def rearranging(node: str, model: Any) -> Any:
    return (HyperTile.execute(model, 64, 2, 0, False) if node == "HyperTile" else TomePatchModel.execute(model, 0.5))[0]


@pytest.mark.parametrize("node", ["HyperTile", "Token Merging (TomePatchModel)"])
@pytest.mark.parametrize("first", [True, False])
def test_rearranged_tokens_are_refused_before_sampling(
    model: Any, adapter: Any, subject: Any, node: str, first: bool
) -> None:
    started: list[int] = []
    other = rearranging(node, model) if first else model
    patched = moma(other, adapter, subject, shortcut=tiny_shortcut())
    if not first:
        patched = rearranging(node, patched)
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: started.append(1))
    try:
        with pytest.raises(ValueError) as raised:
            run(patched, subject, size=(16, 16))
    finally:
        handle.remove()
    assert message(node) in str(raised.value) and not started
    assert run(model, subject).isfinite().all()


class AbstractDiffusion:
    """As the pack TiledDiffusion: its wrappers derive from a class of this name, and call the model tile by tile."""

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        x, c = args["input"], args["c"]
        tiles = [x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]]
        return torch.cat([apply_model(tile, args["timestep"], **c) for tile in tiles], dim=-1)


class MultiDiffusion(AbstractDiffusion):
    """One of them."""


def test_tiles_are_refused(model: Any, adapter: Any, subject: Any) -> None:
    """By name where it is known, and in the first step where another wrapper cuts the picture; the model stays good."""
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    expected = run(patched, subject)
    unknown = AbstractDiffusion().__call__
    for wrapper, words in ((MultiDiffusion(), "TiledDiffusion on this model"), (unknown, "another node changed")):
        tiled = patched.clone()
        tiled.set_model_unet_function_wrapper(wrapper)
        with pytest.raises(ValueError, match=f"^MoMA: {words}"):
            run(tiled, subject)
        assert torch.equal(run(patched, subject), expected)


@pytest.mark.parametrize("node", ["HyperTile", "Token Merging (TomePatchModel)"])
def test_rearranged_tokens_work_with_the_image_tokens_alone(model: Any, adapter: Any, subject: Any, node: str) -> None:
    """Cross-attention sees every place as before: the mask tells places apart; zero weight is the node's picture."""
    options = {"size": (16, 16), "steps": 2}

    def seeded_run(patched: Any) -> torch.Tensor:
        torch.manual_seed(0)  # both nodes draw from the global generator
        return run(patched, subject, **options)

    theirs = seeded_run(rearranging(node, model))
    on, off = (rearranging(node, moma(model, adapter, subject, weight=weight)) for weight in (1.0, 0.0))
    assert torch.equal(seeded_run(off), theirs)
    ours = seeded_run(on)
    assert not close(ours, theirs, 1e-2)
    assert float(masks_of(on, ours)[subject.key].std()) > 0.05


def test_unknown_rearranging_is_refused_in_the_first_step(model: Any, adapter: Any, subject: Any) -> None:
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut()).clone()
    patched.set_model_attn1_patch(lambda q, k, v, _: (q[:, ::2], k, v))
    with pytest.raises(ValueError) as raised:
        run(patched, subject)
    assert message("Other nodes that re-arrange attention") in str(raised.value)


class _Waits(TorchFunctionMode):
    """Notes where the pack's own code makes the CPU wait for the device."""

    NAMES = frozenset({"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        caller = sys._getframe(1).f_code.co_filename
        if name in self.NAMES and "moma_modules" in caller:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def computing_all(**settings: Any) -> Forward:
    """A Forward that leaves no queries out, as on a GPU."""
    return Forward(**{**settings, "sparse_shortcut": False})


def test_no_step_waits_for_the_device(model: Any, adapter: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first forward to the last, computing all queries as on a GPU.

    What others add to a slot may wait: their noise range is read then.
    """
    monkeypatch.setattr(run_module, "Forward", computing_all)
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    run(patched, subject)  # the reference pass is kept from here on
    assert _waits(patched, subject) == []
    assert "__float__" in _waits(ipadapter(patched), subject)


def _waits(patched: Any, subject: Any) -> list[str]:
    found: list[str] = []
    forwards: list[Any] = []
    with ExitStack() as stack:

        def enter(*_: Any) -> None:
            if not forwards:
                forwards.append(stack.enter_context(_Waits()))

        def leave(*_: Any) -> None:
            found[:] = forwards[0].found

        unet = patched.model.diffusion_model
        for handle in (unet.register_forward_pre_hook(enter), unet.register_forward_hook(leave)):
            stack.callback(handle.remove)
        run(patched, subject, steps=3)
    return found
