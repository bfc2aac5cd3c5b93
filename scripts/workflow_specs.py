"""What the example workflows are. `make_workflows.py` writes them."""

from dataclasses import dataclass, field
from typing import Any

from graph import BYPASSED, MUTED, BlueprintText, Graph, Json, Model, Node, Output, Port


@dataclass(frozen=True)
class Files:
    """What belongs together: names as the loaders list them."""

    checkpoint: str
    mllm: str
    adapter: str


RELEASED = Files("v1-5-pruned-emaonly-fp16.safetensors", "MoMA_llava_7b", "MoMA_llava_7b/attn_adapters_projectors.th")
SMALL = Files("moma_mini.safetensors", "moma_mini_llava", "moma_mini_adapter.safetensors")
"""These come with the pack, and so does a subject of them."""
SMALL_SIDE = 128
"""Pixels, across and down, of what they draw."""
SAVED = "striped_cup.safetensors"

OPENPOSE = Model(
    "control_v11p_sd15_openpose_fp16.safetensors",
    "https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_openpose_fp16.safetensors",
    "controlnet",
)
BIREFNET = Model(
    "birefnet.safetensors",
    "https://huggingface.co/Comfy-Org/BiRefNet/resolve/main/background_removal/birefnet.safetensors",
    "background_removal",
)
BEACH = "A cup on a beach."
PAINT = "Load Image (paint the mask here)"
YOURS = "Your picture (unmute: Ctrl+M; paint the mask here)"
"""Titles of nodes that open muted say how to turn them on, and so do those of bypassed ones."""
LEARNT = {"steps": 50, "cfg": 7.5}
"""As in the paper."""
SAMPLING = {"seed": 1, **LEARNT, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
BOTH_WORLDS = {"steps": 30, "cfg": 5.0}
"""What the small world draws well with, and SD1.5 too."""
PARTS, SIZE_SLOT = 3, 5
"""Outputs of Load MoMA Checkpoint: first the parts, as of Load Checkpoint, then picture and mask, then the size."""
WIDTHS = (340, 380, 380, 300, 340)
PICTURE_WIDTH = 480
"""Of the column with the user's picture and the note, which has a table."""
WITH_PICTURE = (PICTURE_WIDTH, *WIDTHS)
STAGES = ("Load", "Subject", "Prompt and model", "Sample", "Result")
PICTURE = "Your picture"


@dataclass
class Base:
    """The nodes that every workflow has, and where the next one connects."""

    graph: Graph
    checkpoint: Node
    adapter: Node
    model: Output
    clip: Output
    vae: Output
    size: Output | int = 512
    subject: Output | None = None
    named: dict[str, Node] = field(default_factory=dict)


def try_it() -> Graph:
    """The small world that comes with the pack: one subject, somewhere else and made of something else."""
    graph = Graph("try_it", WIDTHS, groups=STAGES)
    loader = _loader(graph)
    files = graph.add("MoMALoad", 0, model_name=SMALL.mllm, adapter_name=SMALL.adapter, tall=230)
    graph.add("PreviewImage", 0, images=loader.out("image"), title="The subject", tall=300)
    base = _base(graph, loader, files, {"mllm": files})
    unpatched = base.model
    graph.note(1, height=250)
    negative = _negative(base, 2)
    canvas = _canvas(base, 2)
    for name, prompt, strength in (
        ("new_context", "A cup on the moon.", 1.0),
        ("new_texture", "A cup made of wood on the moon.", 0.4),
    ):
        subject = _extract(base, loader.out("image"), loader.out("mask"), prompt, save=False)
        base.model = unpatched
        sampler = _sampler(base, (_apply_subject(base, subject, strength), negative), 3, canvas, steps=20, cfg=4.0)
        decoded = graph.add("VAEDecode", 4, samples=sampler.out("LATENT"), vae=base.vae)
        graph.add("SaveImage", 4, images=decoded.out("IMAGE"), filename_prefix=f"MoMA/try_it_{name}", tall=300)
    return graph


def simple() -> Graph:
    """One subject and one prompt, in as few nodes as they need."""
    graph = Graph("simple", WITH_PICTURE, before=1, groups=(PICTURE, *STAGES))
    loader = _loader(graph)
    _your_picture(graph, loader)
    files = graph.add("MoMALoad", 0, model_name=SMALL.mllm, adapter_name=SMALL.adapter)
    base = _base(graph, loader, files, {"mllm": files})
    subject = _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    _how_to(graph)
    positive = _apply_subject(base, subject, 1.0)
    sampler = _sampler(base, (positive, _negative(base, 2)), 3, _canvas(base, 3))
    decoded = graph.add("VAEDecode", 3, samples=sampler.out("LATENT"), vae=base.vae)
    graph.add("SaveImage", 4, images=decoded.out("IMAGE"), filename_prefix="MoMA/simple", tall=440)
    return graph


def new_context() -> Graph:
    """The same subject somewhere else."""
    return _one_subject("new_context", BEACH, 1.0)


def new_texture() -> Graph:
    """The same shape, made of something else."""
    return _one_subject("new_texture", "A cup made of wood on the moon.", 0.4)


def from_subject() -> Graph:
    """A saved subject, without the language model."""
    graph = Graph("from_subject", (340, PICTURE_WIDTH, *WIDTHS[2:]), groups=("Load", "", *STAGES[2:]))
    base = _small(graph, _loader(graph, asks=()), mllm=False)
    loaded = graph.add("MoMALoadSubject", 0, id=5, subject_name=SAVED, asks=("subject_name",))
    base.subject = loaded.out("subject")
    encoded = _encode(base, asks=("prompt",))
    _patch(base)
    _sample(base, encoded, "from_subject")
    graph.note(1, 560, "files")
    return graph


def auto_mask() -> Graph:
    """The mask of the user's picture comes from background removal."""
    graph = Graph("auto_mask", WITH_PICTURE, before=1, groups=(PICTURE, *STAGES))
    loader = _loader(graph)
    image = graph.add("LoadImage", -1, image="example.png", mode=MUTED, title="Your picture (unmute all three: Ctrl+M)")
    remover = graph.add(
        "LoadBackgroundRemovalModel",
        -1,
        bg_removal_name=BIREFNET.name,
        models=[BIREFNET],
        mode=MUTED,
        title="BiRefNet (a download; unmute: Ctrl+M)",
    )
    removed = graph.add(
        "RemoveBackground",
        -1,
        bg_removal_model=remover.out("bg_model"),
        image=image.out("IMAGE"),
        mode=MUTED,
        title="Its subject's mask (unmute: Ctrl+M)",
    )
    loader.values |= {"image": image.out("IMAGE"), "mask": removed.out("mask")}
    base = _small(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    graph.note(-1, 760, "files", "switch_auto_mask")
    encoded = _encode(base)
    _patch(base)
    _sample(base, encoded, "auto_mask")
    return graph


def two_subjects() -> Graph:
    """Two subjects, each in its half of the picture."""
    graph = Graph("two_subjects", (PICTURE_WIDTH, 340, 380, 300, 340, 380, 300, 340), before=1)
    graph.groups = ("Your pictures", "Load", "Subjects", "Regions", "Prompts", "Model", "Sample", "Result")
    loader = _loader(graph)
    base = _small(graph, loader)
    _your_picture(graph, loader, "Your cup (unmute: Ctrl+M; paint the mask here)")
    # A second one for its picture alone: the checkpoint is that of the first.
    other = _loader(graph, example="checked bag", title="The bag (leave this checkpoint)")
    _your_picture(graph, other, "Your bag (unmute: Ctrl+M; paint the mask here)")
    _how_to(graph)
    subjects = []
    for word, node in (("cup", loader), ("bag", other)):
        extracted = _extract(base, node.out("image"), node.out("mask"), f"A {word} on a beach.", word=word, save=False)
        subjects.append((word, extracted))
    one = _canvas(base, 5)
    wide = graph.add("LatentConcat", 5, samples1=one, samples2=one, dim="x", title="Two side by side")
    full = graph.add("SolidMask", 2, value=0.0, width=1024, height=512, title="Black, of that shape")
    half = graph.add("SolidMask", 2, value=1.0, width=512, height=512, title="White half")
    combined: Output | None = None
    masks = []
    for number, (word, _) in enumerate(subjects):
        masks.append(
            graph.add(
                "MaskComposite",
                2,
                destination=full.out("MASK"),
                source=half.out("MASK"),
                x=number * 512,
                y=0,
                operation="add",
                title=f"Region of the {word}",
            )
        )
    for (word, subject), mask in zip(subjects, masks, strict=True):
        base.subject = subject
        encoded = graph.add("MoMATextEncode", 3, clip=base.clip, subject=subject, title=f"Prompt: {word}")
        limited = graph.add(
            "ConditioningSetMask",
            3,
            conditioning=encoded.out("positive"),
            mask=mask.out("MASK"),
            title=f"Prompt of the {word}, in its region",
        )
        _patch(base, column=4, region_mask=mask.out("MASK"))
        if combined is None:
            combined = limited.out("CONDITIONING")
        else:
            both = graph.add(
                "ConditioningCombine", 5, conditioning_1=combined, conditioning_2=limited.out("CONDITIONING")
            )
            combined = both.out("CONDITIONING")
    assert combined is not None
    negative = _negative(base, 5)
    sampler = _sampler(base, (combined, negative), 5, wide.out("LATENT"), seed=2)
    _decode(base, sampler, "two_subjects", 5, 6)
    return graph


def pose() -> Graph:
    """A ControlNet says how the subject stands."""
    graph = Graph("pose", (PICTURE_WIDTH, 340, 380, 380, 340, 300, 340), before=1)
    graph.groups = (PICTURE, *STAGES[:3], "Pose: select the three, Ctrl+B", *STAGES[3:])
    loader = _loader(graph, example="striped robot")
    _your_picture(graph, loader)
    base = _small(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), "A robot on a meadow.", word="robot", save=False)
    _how_to(graph)
    positive, negative = _encode(base)
    _patch(base)
    net = graph.add(
        "ControlNetLoader",
        3,
        control_net_name=OPENPOSE.name,
        models=[OPENPOSE],
        mode=BYPASSED,
        title="ControlNet (a download; turn on: Ctrl+B)",
    )
    pose_image = graph.add("LoadImage", 3, image="example.png", mode=BYPASSED, title="Pose (turn on: Ctrl+B)")
    applied = graph.add(
        "ControlNetApplyAdvanced",
        3,
        positive=positive,
        negative=negative,
        control_net=net.out("CONTROL_NET"),
        image=pose_image.out("IMAGE"),
        strength=0.8,
        mode=BYPASSED,
        title="Apply ControlNet (turn on: Ctrl+B)",
    )
    conditioning = (applied.out("positive"), applied.out("negative"))
    _sample(base, conditioning, "pose", columns=(4, 5))
    return graph


def style_lora() -> Graph:
    """A LoRA gives the style, MoMA the subject."""
    graph = Graph("style_lora", WITH_PICTURE, before=1, groups=(PICTURE, *STAGES))
    loader = _loader(graph)
    _your_picture(graph, loader)
    base = _small(graph, loader)
    lora = graph.add(
        "LoraLoader",
        0,
        model=base.model,
        clip=base.clip,
        lora_name="style.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
        mode=BYPASSED,
        title="Your SD1.5 style (turn on: Ctrl+B)",
    )
    base.model, base.clip = lora.out("MODEL"), lora.out("CLIP")
    _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    _how_to(graph)
    encoded = _encode(base)
    _patch(base, strength=0.6)
    _sample(base, encoded, "style_lora")
    return graph


def hires_fix() -> Graph:
    """A second pass at one and a half times the size."""
    graph = Graph("hires_fix", (PICTURE_WIDTH, 340, 380, 380, 300, 300, 340), before=1)
    graph.groups = (PICTURE, *STAGES[:3], "First pass", "Second pass", "Result")
    loader = _loader(graph)
    base = _small(graph, loader)
    _your_picture(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    _how_to(graph)
    encoded = _encode(base)
    _patch(base)
    small = _sampler(base, encoded, 3, _canvas(base, 3), title="First pass")
    large = graph.add(
        "LatentUpscaleBy",
        4,
        samples=small.out("LATENT"),
        upscale_method="bislerp",
        scale_by=1.5,
        title="1.5 times the size",
    )
    second = _sampler(base, encoded, 4, large.out("LATENT"), denoise=0.4, steps=30, title="Second pass", asks=())
    _decode(base, second, "hires_fix", 4, 5)
    return graph


def prompts() -> Graph:
    """Several prompts for one subject in one run."""
    graph = Graph("prompts", (PICTURE_WIDTH, 340, 380, 380, 380, 300, 240, 340), before=1)
    graph.groups = (PICTURE, "Load", "Subject", "Model", "Prompts", "Sample", "Decode", "Results")
    loader = _loader(graph)
    base = _small(graph, loader)
    _your_picture(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    _how_to(graph)
    _patch(base)
    negative = _negative(base, 2)
    canvas = _canvas(base, 2)
    for number, text in enumerate((BEACH, "A cup in the snow.", "A cup in a city at night."), 1):
        encoded = graph.add(
            "MoMATextEncode",
            3,
            clip=base.clip,
            subject=base.subject,
            prompt=text,
            title=f"Prompt {number}",
            asks=("prompt",),
        )
        sampler = _sampler(base, (encoded.out("positive"), negative), 4, canvas, title=f"Picture {number}")
        decoded = graph.add("VAEDecode", 5, samples=sampler.out("LATENT"), vae=base.vae)
        graph.add("SaveImage", 6, images=decoded.out("IMAGE"), filename_prefix=f"MoMA/prompt_{number}")
    return graph


def strength_study() -> Graph:
    """One sheet over strength and weight."""
    graph = Graph("strength_study", (PICTURE_WIDTH, 340, 380, 380, 620), before=1)
    graph.groups = (PICTURE, "Load", "Subject", "Prompt and study", "Sheet")
    loader = _loader(graph)
    base = _small(graph, loader)
    _your_picture(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False)
    _how_to(graph)
    positive, negative = _encode(base)
    study = graph.add(
        "MoMAStrengthStudy",
        2,
        model=base.model,
        adapter=base.adapter.out("adapter"),
        subject=base.subject,
        vae=base.vae,
        clip=base.clip,
        positive=positive,
        negative=negative,
        latent_image=_canvas(base, 1),
        strengths="0.0, 0.4, 0.7, 1.0, 1.2",
        weights="0.6, 1.0",
        seed=1,
        **BOTH_WORLDS,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        control_after_generate="fixed",
        asks=("strengths", "weights", "seed"),
    )
    graph.add("SaveImage", 3, images=study.out("sheet"), filename_prefix="MoMA/strength_study", tall=420)
    return graph


WORKFLOWS = (
    try_it,
    simple,
    new_context,
    new_texture,
    from_subject,
    auto_mask,
    two_subjects,
    pose,
    style_lora,
    hires_fix,
    prompts,
    strength_study,
)

PERSONALIZE = BlueprintText(
    "MoMA personalize",
    "Picture, mask, word and prompt in; a new picture of that subject out (MoMA). It starts with the small models that "
    "come with the pack and, without a picture, with their example; for photographs choose your SD1.5 checkpoint, "
    "MoMA_llava_7b and its adapter, and 512 for width and height.",
    "Personalization",
)


def personalize() -> tuple[Graph, list[Port], list[Port]]:
    """The blueprint: the graph inside, what its node takes and what it gives."""
    graph = Graph("personalize", WIDTHS)
    loader = _loader(graph, asks=())
    base = _small(graph, loader)
    extract = _extract(base, loader.out("image"), loader.out("mask"), BEACH, save=False).node
    encoded = _encode(base)
    _patch(base)
    sampler = _sampler(base, encoded, 3, _canvas(base, 3, (SMALL_SIDE, SMALL_SIDE)))
    decoded = graph.add("VAEDecode", 3, samples=sampler.out("LATENT"), vae=base.vae)
    mask = graph.add("MoMASubjectMask", 4, model=base.model, latent=sampler.out("LATENT"))
    canvas = next(node for node in graph.nodes if node.kind == "EmptyLatentImage")
    inputs = [
        Port("image", [(loader, "image")]),
        Port("mask", [(loader, "mask")]),
        Port("subject", [(extract, "subject")]),
        Port("prompt", [(extract, "prompt")]),
        Port("strength", [(base.named["shortcut"], "strength")]),
        Port("negative_prompt", [(base.named["negative"], "text")]),
        Port("width", [(canvas, "width")]),
        Port("height", [(canvas, "height")]),
        Port("seed", [(sampler, "seed")]),
        Port("steps", [(sampler, "steps")]),
        Port("ckpt_name", [(base.checkpoint, "ckpt_name")]),
        Port("model_name", [(base.named["mllm"], "model_name")]),
        Port("adapter_name", [(base.adapter, "adapter_name")]),
    ]
    outputs = [
        Port("image", [(decoded, "IMAGE")]),
        Port("subject_mask", [(mask, "mask")]),
        Port("moma_subject", [(extract, "subject")]),
    ]
    return graph, inputs, outputs


def for_photographs(prompt: Json) -> Json:
    """An API prompt of a workflow that starts in the small world, for who has no editor to switch it.

    Args:
        prompt: With the nodes that it opens without.

    Returns:
        The same with the released weights and the paper's settings, its pictures straight from Load Image, so that
        what looks at them needs no checkpoint.
    """
    loaders = {name: node["inputs"] for name, node in prompt.items() if node["class_type"] == "MoMALoadMini"}
    changes: dict[str, Json] = {
        "MoMALoad": {"model_name": RELEASED.mllm, "adapter_name": RELEASED.adapter},
        "MoMALoadMLLM": {"model_name": RELEASED.mllm},
        "MoMALoadAdapter": {"adapter_name": RELEASED.adapter},
        "MoMAStrengthStudy": {"cfg": LEARNT["cfg"]},
    }

    def plain(value: Any) -> Any:
        if not isinstance(value, list) or value[0] not in loaders or value[1] < PARTS:
            return value
        return 512 if value[1] == SIZE_SLOT else loaders[value[0]][("image", "mask")[value[1] - PARTS]]

    made: Json = {}
    for name, node in prompt.items():
        inputs = {key: plain(value) for key, value in node["inputs"].items()} | changes.get(node["class_type"], {})
        if node["class_type"] == "KSampler":  # A second pass keeps its own steps.
            inputs |= LEARNT if inputs["denoise"] == 1 else {"cfg": LEARNT["cfg"]}
        made[name] = {**node, "inputs": inputs}
        title = node["_meta"]["title"].split(" (")[0]
        if node["class_type"] == "LoadImage":
            title = PAINT if "paint" in node["_meta"]["title"] else title
        if "Ctrl+" in node["_meta"]["title"]:
            made[name]["_meta"] = {"title": title}
    for name in loaders:
        made[name] |= {"class_type": "CheckpointLoaderSimple", "_meta": {"title": "Load Checkpoint"}}
        made[name]["inputs"] = {"ckpt_name": RELEASED.checkpoint}
    used = {value[0] for node in made.values() for value in node["inputs"].values() if isinstance(value, list)}
    return {name: node for name, node in made.items() if name not in set(loaders) - used}


def _one_subject(name: str, prompt: str, strength: float) -> Graph:
    graph = Graph(name, WITH_PICTURE, before=1, groups=(PICTURE, *STAGES))
    loader = _loader(graph)
    _your_picture(graph, loader)
    base = _small(graph, loader)
    _extract(base, loader.out("image"), loader.out("mask"), prompt, save=False)
    encoded = _encode(base)
    _patch(base, strength=strength)
    _sample(base, encoded, name)
    assert base.subject is not None
    graph.add("MoMASaveSubject", 1, subject=base.subject, filename_prefix="cup")
    _how_to(graph)
    return graph


def _loader(graph: Graph, **values: Any) -> Node:
    """The loader of the workflows that start in the small world."""
    settings = {"ckpt_name": SMALL.checkpoint, "example": "striped cup", "asks": ("example",), **values}
    return graph.add("MoMALoadMini", 0, **settings)


def _your_picture(graph: Graph, loader: Node, title: str = YOURS) -> None:
    """Where the user's own picture comes in, when it is turned on."""
    picture = graph.add("LoadImage", -1, image="example.png", mode=MUTED, title=title)
    loader.values |= {"image": picture.out("IMAGE"), "mask": picture.out("MASK")}


def _how_to(graph: Graph) -> None:
    graph.note(-1, 700, "files", "switch")


def _base(graph: Graph, loader: Node, adapter: Node, named: dict[str, Node]) -> Base:
    outputs = (loader.out("model"), loader.out("clip"), loader.out("vae"), loader.out("size"))
    return Base(graph, loader, adapter, *outputs, named=named)


def _small(graph: Graph, loader: Node, mllm: bool = True) -> Base:
    """The other loaders of a composed workflow that starts in the small world."""
    named = {"mllm": graph.add("MoMALoadMLLM", 0, model_name=SMALL.mllm)} if mllm else {}
    own_id = None if mllm else 4
    return _base(graph, loader, graph.add("MoMALoadAdapter", 0, id=own_id, adapter_name=SMALL.adapter), named)


def _extract(base: Base, image: Output, mask: Output, prompt: str, word: str = "cup", save: bool = True) -> Output:
    extracted = base.graph.add(
        "MoMAExtractSubject",
        1,
        mllm=base.named["mllm"].out("mllm"),
        adapter=base.adapter.out("adapter"),
        image=image,
        mask=mask,
        subject=word,
        prompt=prompt,
        asks=("subject", "prompt"),
    )
    base.subject = extracted.out("subject")
    if save:
        base.graph.add("MoMASaveSubject", 1, subject=base.subject, filename_prefix=word.replace(" ", "_"))
    return base.subject


def _encode(base: Base, column: int = 2, **values: Any) -> tuple[Output, Output]:
    encoded = base.graph.add("MoMATextEncode", column, clip=base.clip, subject=base.subject, **values)
    return encoded.out("positive"), _negative(base, column)


def _negative(base: Base, column: int) -> Output:
    node = base.graph.add("CLIPTextEncode", column, clip=base.clip, text="", title="Negative prompt")
    base.named["negative"] = node
    return node.out("CONDITIONING")


def _patch(base: Base, column: int = 2, strength: float = 1.0, **region: Any) -> None:
    shared = {"adapter": base.adapter.out("adapter"), "subject": base.subject, **region}
    applied = base.graph.add("MoMAApplyAdapter", column, model=base.model, **shared)
    shortcut = base.graph.add(
        "MoMASelfAttnShortcut",
        column,
        model=applied.out("model"),
        vae=base.vae,
        clip=base.clip,
        strength=strength,
        asks=("strength",),
        **shared,
    )
    base.named["shortcut"] = shortcut
    base.model = shortcut.out("model")


def _apply_subject(base: Base, subject: Output, strength: float) -> Output:
    parts = {"model": base.model, "clip": base.clip, "vae": base.vae, "subject": subject}
    applied = base.graph.add("MoMAApplySubject", 2, **parts, strength=strength, asks=("strength",))
    base.model = applied.out("model")
    return applied.out("positive")


def _canvas(base: Base, column: int, size: tuple[int, int] | None = None) -> Output:
    """As large as the checkpoint draws, or of a size of its own."""
    width, height = size or (base.size, base.size)
    return base.graph.add("EmptyLatentImage", column, width=width, height=height).out("LATENT")


def _sampler(base: Base, encoded: tuple[Output, Output], column: int, latent: Output, **values: Any) -> Node:
    positive, negative = encoded
    # Room for the line of text that the node shows while it runs.
    learnt = {} if isinstance(base.size, int) else BOTH_WORLDS
    settings = {**SAMPLING, **learnt, "control_after_generate": "randomize", "tall": 330, "asks": ("seed",), **values}
    return base.graph.add(
        "KSampler", column, model=base.model, positive=positive, negative=negative, latent_image=latent, **settings
    )


def _decode(base: Base, sampler: Node, name: str, column: int, last: int) -> None:
    decoded = base.graph.add("VAEDecode", column, samples=sampler.out("LATENT"), vae=base.vae)
    # The picture stands above the mask, but has the higher id: ids of published workflows stay.
    base.graph.add(
        "SaveImage", last, id=decoded.id + 2, images=decoded.out("IMAGE"), filename_prefix=f"MoMA/{name}", tall=440
    )
    base.graph.add("MoMASubjectMask", last, id=decoded.id + 1, model=base.model, latent=sampler.out("LATENT"))


def _sample(
    base: Base,
    encoded: tuple[Output, Output],
    name: str,
    columns: tuple[int, int] = (3, 4),
) -> None:
    sampler = _sampler(base, encoded, columns[0], _canvas(base, columns[0]))
    _decode(base, sampler, name, *columns)
