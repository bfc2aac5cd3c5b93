"""Whole runs on emulated graphics cards: every operand where and what it should be, and no wait within a step."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
import torchgen
import yaml
from comfy.ldm.modules.attention import attention_pytorch
from comfy_execution.utils import CurrentNodeContext
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.prompt.marks import mark_tokens
from comfyui_moma.moma_modules.sampling.caches import caches_of
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.wrappers import patched
from comfyui_moma.moma_modules.subject.reference_image import prepare_references
from comfyui_moma.moma_modules.subject.subject import combine_subjects
from comfyui_moma.nodes.conditioning import TextEncode
from comfyui_moma.nodes.mask import SubjectMask
from comfyui_moma.nodes.patches import ApplyAdapter, SelfAttnShortcut

from workbench.emulated_card import SECOND, Record, emulated_cards
from workbench.fake_device import CARD
from workbench.scene import (
    EMBEDDING,
    close,
    masks_of,
    moma,
    negative,
    positive,
    sample,
    tiny_shortcut,
    tiny_subject,
)
from workbench.tiny_models import adapter_groups, seeded, tiny_clip, tiny_model, tiny_vae

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What a picture may differ from the CPU's: there the shortcut is computed in another order."""

CALLS = {
    *("alias", "contiguous", "detach", "detach_", "expand", "expand_as", "flatten", "reshape", "select", "slice"),
    *("split", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"),
    *("arange", "fill_", "ones", "ones_like", "zero_", "zeros", "zeros_like"),
    *("cat", "narrow", "repeat", "index", "index_add_", "item", "pad", "stack", "upsample_nearest2d", "where"),
    *("__and__", "bitwise_and", "add", "add_", "addcmul", "clamp", "div", "eq", "ge", "gt", "le", "mul", "sub"),
    *("amax", "amin", "aminmax", "any", "mean", "sum"),
    *("layer_norm", "linear", "scaled_dot_product_attention"),
}
"""All that the pack itself calls of torch on the sampling device: little, so that every kind of device has it."""

HALF = {
    *("_to_copy", "_unsafe_view", "alias", "clone", "expand", "select", "slice", "split", "t", "transpose", "view"),
    *("zeros_like", "addcmul", "addmm", "cat", "constant_pad_nd", "index", "mean", "mm", "native_layer_norm"),
    *("layer_norm", "linear", "scaled_dot_product_attention", "stack", "unsqueeze"),
}
"""Kernels that must also take what the UNet computes in, fp16 or bf16; masks and factors stay in fp32."""

START = 120
"""At most so often the host waits before the first step: for the prompts' rows, and once for each new reference."""
END = 16
"""At most so often after the last one, when the masks and the film go to the CPU."""


@dataclass
class Scene:
    """A MODEL with MoMA on it, and what it is sampled with."""

    model: Any
    positive: list
    size: tuple[int, int] = (8, 8)
    batch: int = 1
    sampler: str = "ddim"
    cfg: float = 7.5

    def sample(self, steps: int = 2) -> torch.Tensor:
        """A run."""
        return sample(
            self.model,
            self.positive,
            negative(),
            size=self.size,
            batch=self.batch,
            steps=steps,
            cfg=self.cfg,
            sampler=self.sampler,
            scheduler="normal",
        )


def everything(model: Any, adapter: Any, batch: int = 2) -> Scene:
    """Two subjects with regions and windows, one of them with two references, on a MODEL with a LoRA; a batch."""
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    model = model.clone()
    model.add_patches({key: ("diff", (0.1 * torch.ones(model.model_state_dict()[key].shape),))})
    car = combine_subjects(tiny_subject(adapter, "car"), tiny_subject(adapter, "car", seed=25))
    dog = tiny_subject(adapter, "dog", seed=15)
    both = replace(
        tiny_shortcut(end=0.9), latent=seeded(6, "latent", (2, 4, 8, 8)), noise=seeded(6, "noise", (2, 4, 8, 8))
    )
    left = torch.zeros(1, 5, 7)
    left[..., :4] = 1
    model = moma(model, adapter, car, shortcut=both)
    model = moma(model, adapter, dog, weight=0.7, shortcut=tiny_shortcut(0.6, region=1 - left, start=0.1))
    settings = settings_of(model)
    entry = settings.subjects[0]
    tokens = replace(entry.image_tokens, window=replace(entry.image_tokens.window, region=left, end=0.8))
    model = patched(model, settings.with_subject(car, adapter, image_tokens=tokens))
    return Scene(model, mark_tokens(positive(car), {dog.key: (9,)}), size=(8, 12), batch=batch)


def simple(model: Any, adapter: Any) -> Scene:
    """One subject with both parts."""
    subject = tiny_subject(adapter)
    return Scene(moma(model, adapter, subject, shortcut=tiny_shortcut()), positive(subject))


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def models() -> Callable[[torch.dtype], Any]:
    """Tiny models by what they compute in."""
    return cache(lambda dtype: tiny_model(dtype=dtype))


@contextmanager
def on(model: Any, adapter: Any, device: torch.device, adapter_device: torch.device) -> Iterator[Any]:
    """The MODEL as ComfyUI's loader would give it on a machine with that device, and the adapter on another."""
    clone = model.clone()
    clone.load_device = device
    # What ComfyUI chooses on a card; on a CPU it would be its own, in pieces.
    clone.model_options["transformer_options"]["optimized_attention_override"] = lambda _, *args, **kwargs: (
        attention_pytorch(*args, **kwargs)
    )
    before = adapter.patcher.load_device
    adapter.patcher.load_device = adapter_device
    try:
        yield clone
    finally:
        for used in {loaded.device for loaded in comfy.model_management.current_loaded_models}:
            comfy.model_management.free_memory(1e30, used)
        adapter.patcher.load_device = before
        caches_of(adapter).references.clear()


@contextmanager
def watched(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Counter[str]]:
    """Every attention projection computes on that device in that dtype; gives how often each did."""
    seen: Counter[str] = Counter()

    def look(name: str) -> Callable[..., None]:
        def check(_: Any, args: Any) -> None:
            seen[name] += 1
            assert (args[0].device, args[0].dtype) == (device, dtype), name

        return check

    ends = ("to_q", "to_k", "to_v", "to_out.0", "to_k_ip", "to_v_ip", "projector.proj")
    found = [(name, leaf) for name, leaf in module.named_modules() if name.endswith(ends)]
    handles = [leaf.register_forward_pre_hook(look(name)) for name, leaf in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(
    make: Callable[[Any, Any], Scene],
    model: Any,
    adapter: Any,
    device: torch.device = CARD,
    adapter_device: torch.device = CARD,
    steps: int = 2,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Record]:
    """Samples, masks, and what happened on the cards."""
    dtype = model.model.get_dtype_inference()
    with (
        emulated_cards() as record,
        on(model, adapter, device, adapter_device) as placed,
        watched(model.model.diffusion_model, device, dtype) as unet,
        watched(adapter.module, adapter_device, dtype) as projections,
    ):
        scene = make(placed, adapter)
        samples = scene.sample(steps)
        assert len(unet) == 16 * 8 and len(projections) == 1 + 32 * 2  # all were used
        return samples, masks_of(scene.model, samples), record


def on_cpu(make: Callable[[Any, Any], Scene], model: Any, adapter: Any, steps: int = 2) -> Any:
    """Samples and masks of the same run without any card."""
    with on(model, adapter, CPU, CPU) as placed:
        scene = make(placed, adapter)
        samples = scene.sample(steps)
        return samples, masks_of(scene.model, samples)


def check(record: Record) -> None:
    """What holds for every run."""
    assert not record.ours(in_step=True)
    assert not record.promotions
    assert not any(torch.float64 in dtypes for dtypes in record.dtypes.values())


@pytest.fixture(scope="module")
def whole_runs(models: Any, adapter: Any) -> Callable[[torch.dtype], tuple[torch.Tensor, Record]]:
    """Samples of a run with everything on a card, and what happened there, by what it computes in."""

    @cache
    def whole_run(dtype: torch.dtype) -> tuple[torch.Tensor, Record]:
        samples, _, record = run(everything, models(dtype), adapter)
        return samples, record

    return whole_run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_run_on_a_card_is_that_on_the_cpu(models: Any, adapter: Any, whole_runs: Any, dtype: torch.dtype) -> None:
    expected, _ = on_cpu(everything, models(dtype), adapter)
    samples, record = whole_runs(dtype)
    check(record)
    assert close(samples, expected, TOLERANCE[dtype])


def test_weights_in_fp8(adapter: Any) -> None:
    """Cast for every layer, in what the MODEL computes in; so do the adapter's."""
    model = tiny_model(dtype=torch.float8_e4m3fn, compute=torch.bfloat16)
    expected, _ = on_cpu(simple, model, adapter)
    samples, _, record = run(simple, model, adapter)
    check(record)
    assert close(samples, expected, TOLERANCE[torch.bfloat16])


def test_weights_that_are_streamed(models: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """--novram: those of the MODEL and the adapter stay on the CPU and are brought for every layer."""
    expected, _ = on_cpu(simple, models(torch.float32), adapter)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    samples, _, record = run(simple, models(torch.float32), adapter)
    check(record)
    assert not any("model_patcher.py:load" in wait for wait in record.others())
    assert close(samples, expected)


PLACES = {
    "the adapter on the second card": (CARD, SECOND),
    "the MODEL on the second card": (SECOND, CARD),
    "the adapter on the CPU": (CARD, CPU),
    "the MODEL on the CPU": (CPU, CARD),
}


@pytest.mark.parametrize("places", PLACES)
def test_the_adapter_computes_where_it_is(models: Any, adapter: Any, places: str) -> None:
    """Select Model Device moves the MODEL alone. Dynamic VRAM has weights for one card only."""
    device, adapter_device = PLACES[places]
    expected, masks = on_cpu(simple, models(torch.float32), adapter)
    samples, found, record = run(simple, models(torch.float32), adapter, device, adapter_device)
    check(record)
    assert close(samples, expected)
    assert all(close(found[key], mask, 1e-3) for key, mask in masks.items())


SAMPLERS = {"euler_ancestral": 1.0, "dpmpp_2m_sde": 7.5, "heun": 1.0, "uni_pc": 7.5}
"""With which guidance: without any, there is no negative row."""
NOISE_OF_THE_DEVICE = "euler_ancestral"
"""ComfyUI draws its noise from another seed on a card than on the CPU."""


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_samplers(models: Any, adapter: Any, sampler: str) -> None:
    def scene(model: Any, adapter: Any) -> Scene:
        return replace(simple(model, adapter), sampler=sampler, cfg=SAMPLERS[sampler])

    samples, _, record = run(scene, models(torch.float32), adapter)
    check(record)
    if sampler != NOISE_OF_THE_DEVICE:
        assert close(samples, on_cpu(scene, models(torch.float32), adapter)[0])


def test_what_the_host_waits_for_does_not_grow_with_the_steps(models: Any, adapter: Any, whole_runs: Any) -> None:
    few, many = whole_runs(torch.float32)[1], run(everything, models(torch.float32), adapter, steps=9)[2]
    for record in (few, many):
        check(record)
        end = sum(count for wait, count in record.ours(in_step=False).items() if "run_log" in wait)
        assert 0 < end <= END
        assert sum(record.ours(in_step=False).values()) - end <= START
    assert {wait for wait in many.ours(in_step=False)} == {wait for wait in few.ours(in_step=False)}


class Client:
    """Somebody who looks: takes what ComfyUI's server would send."""

    client_id = "somebody"

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.pictures: list[Any] = []

    def send_progress_text(self, text: str, *_: Any) -> None:
        self.texts.append(text)

    def send_sync(self, _: Any, message: Any, *__: Any) -> None:
        self.pictures.append(message[0][1])


@pytest.mark.parametrize("asked", [True, False])
def test_only_a_live_mask_makes_the_host_wait_within_steps(
    models: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Once for each picture, where the user asked for it and somebody looks."""
    server = pytest.importorskip("server", reason="needs a running one", exc_type=Exception)
    client = Client()
    monkeypatch.setattr(server.PromptServer, "instance", client, raising=False)

    def scene(model: Any, adapter: Any) -> Scene:
        shown = simple(model, adapter)
        settings = settings_of(shown.model)
        (entry,) = settings.subjects
        tokens = replace(entry.image_tokens, show_on="7" if asked else None)
        return replace(
            shown, model=patched(shown.model, settings.with_subject(entry.subject, adapter, image_tokens=tokens))
        )

    with CurrentNodeContext("a prompt", "7"):
        _, _, record = run(scene, models(torch.float32), adapter)
    assert bool(client.pictures) == asked and client.texts
    expected = {"cuda to cpu at moma_modules/host/pictures.py:picture": len(client.pictures)} if asked else {}
    assert record.ours(in_step=True) == expected


def test_all_that_is_called_on_the_device_is_a_small_set(whole_runs: Any) -> None:
    """What is new here: does every kind of device have it, for these sizes and types? Then add it."""
    _, record = whole_runs(torch.float16)
    new = {name: site for name, site in record.calls.items() if name not in CALLS}
    assert not new and len(record.calls) > 40
    assert {name for name, dtypes in record.dtypes.items() if torch.float16 in dtypes} <= HALF
    kinds = set().union(*record.dtypes.values())
    assert kinds == {torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool}


def without_kernel(operations: set[str], device: str) -> set[str]:
    """Those operations that torch, by its own table, neither has on a kind of device nor makes of what it has there."""
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    table = yaml.load(file.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {entry["func"].partition("(")[0]: entry for entry in table}
    everywhere = {device} | {f"Composite{kind}" for kind in ("ImplicitAutograd", "ExplicitAutograd")}
    found: set[str] = set()
    for name, entry in entries.items():
        implemented = entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        keys = implemented.get("dispatch", {"CompositeImplicitAutograd": ""})
        if everywhere & {key.strip() for several in keys for key in several.split(",")}:
            found.add(name.partition(".")[0])
    return operations - found


def test_apple_has_all_that_runs_on_the_device(whole_runs: Any) -> None:
    _, record = whole_runs(torch.float16)
    assert not without_kernel(set(record.kernels), "MPS")
    assert without_kernel({"linalg_eig"}, "MPS")  # the table does tell


def test_select_model_device_after_our_nodes(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node makes the MODEL anew on another card, and so it does the adapter that goes with it."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu")
    torch.save(adapter_groups(embedding=EMBEDDING), tmp_path / "adapter.th")
    adapter = load_adapter(tmp_path / "adapter.th")
    expected, masks = on_cpu(simple, models(torch.float32), adapter)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *_, **__: [CARD, SECOND])
    with emulated_cards() as record, on(models(torch.float32), adapter, CARD, CARD) as first:
        first.cached_patcher_init = (tiny_model, ())
        scene = simple(first, adapter)
        moved = nodes.SelectModelDeviceNode.execute(scene.model, "gpu:1")[0]
        (entry,) = settings_of(moved).subjects
        assert moved.load_device == entry.adapter.device == SECOND and adapter.device == CARD
        assert moved.get_additional_models_with_key("moma") == [entry.adapter.patcher]
        with (
            watched(moved.model.diffusion_model, SECOND, torch.float32) as unet,
            watched(entry.adapter.module, SECOND, torch.float32) as projections,
        ):
            samples = replace(scene, model=moved).sample()
        assert unet and projections
        assert close(samples, expected)
        assert close(next(iter(masks_of(moved, samples).values())), next(iter(masks.values())), 1e-3)
        assert close(scene.sample(), expected)  # the first one still runs on its own card
    check(record)


def test_multigpu_work_units_after_our_nodes_are_refused_by_name(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node makes the adapter anew for the second card; that MoMA does not work there is said by the run."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu")
    torch.save(adapter_groups(embedding=EMBEDDING), tmp_path / "adapter.th")
    adapter = load_adapter(tmp_path / "adapter.th")
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *_, **__: [CARD, SECOND])
    with emulated_cards(), on(models(torch.float32), adapter, CARD, CARD) as first:
        first.cached_patcher_init = (tiny_model, ())
        scene = simple(first, adapter)
        split = nodes.MultiGPUCFGSplitNode.execute(scene.model, 2)[0]
        with pytest.raises(ValueError, match="MoMA does not work with MultiGPU work units: remove that node"):
            replace(scene, model=split).sample()


def through_the_nodes(model: Any, adapter: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and mask, where all that ComfyUI's own nodes hand over lies on `device`."""
    vae, clip = tiny_vae(), tiny_clip()
    vae.device = vae.output_device = vae.patcher.load_device = clip.patcher.load_device = device
    image = torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(3))
    left = torch.zeros(1, 40, 56)
    left[..., :30] = 1
    seen = prepare_references(image.to(device), left.to(device))
    small = slice(None), slice(None, None, 8), slice(None, None, 8)
    subject = replace(tiny_subject(adapter), images=seen.images[small], masks=seen.masks[small])
    prompt = TextEncode.execute(clip, subject, "a car on a table", "photo of a {subject}. {prompt}")[0]
    model = ApplyAdapter.execute(model, adapter, subject, 1.0, 0.0, 1.0, left.to(device))[0]
    model = SelfAttnShortcut.execute(model, adapter, subject, vae, clip, 1.0, 0.0, 1.0, 0, left.to(device))[0]
    samples = Scene(model, prompt).sample()
    mask = SubjectMask.execute(model, {"samples": samples.to(device)})[0]
    return samples, mask


def test_all_on_the_card_as_with_gpu_only(models: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models(torch.float32)
    with torch.inference_mode(), on(model, adapter, CPU, CPU) as placed:
        samples, mask = through_the_nodes(placed, adapter, CPU)
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: CARD)
    with emulated_cards() as record, torch.inference_mode(), on(model, adapter, CARD, CARD) as placed:
        found, found_mask = (part.cpu() for part in through_the_nodes(placed, adapter, CARD))
    check(record)
    assert close(found, samples) and close(found_mask, mask, 1e-3)
