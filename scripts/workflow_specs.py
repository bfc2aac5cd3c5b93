"""What the example workflows are. `make_workflows.py` writes them."""

from dataclasses import dataclass, field
from typing import Any

from graph import BlueprintText, Graph, Model, Node, Output, Port

CHECKPOINT = Model(
    "v1-5-pruned-emaonly-fp16.safetensors",
    "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    "checkpoints",
)
ADAPTER = "MoMA_llava_7b/attn_adapters_projectors.th"
"""Without an address: no editor downloads a `.th`, and that of ComfyUI 0.16 would call it missing even where it is."""
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
BEACH = "A cup on a beach at sunset."
PAINT = "Load Image (paint the mask here)"
SAMPLING = {"seed": 1, "steps": 50, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
WIDTHS = (340, 380, 380, 300, 340)


@dataclass
class Base:
    """The nodes that every workflow has, and where the next one connects."""

    graph: Graph
    checkpoint: Node
    adapter: Node
    model: Output
    clip: Output
    vae: Output
    subject: Output | None = None
    named: dict[str, Node] = field(default_factory=dict)


def try_it() -> Graph:
    """The small world that comes with the pack: one subject, somewhere else and made of something else."""
    graph = Graph("try_it", (340, 380, 380, 300, 340))
    mini = graph.add("MoMALoadMini", 0, ckpt_name="moma_mini.safetensors", example="striped cup", asks=("example",))
    files = graph.add(
        "MoMALoad", 0, model_name="moma_mini_llava", adapter_name="moma_mini_adapter.safetensors", tall=230
    )
    graph.add("PreviewImage", 0, images=mini.out("image"), title="The subject", tall=300)
    outputs = (mini.out("model"), mini.out("clip"), mini.out("vae"))
    base = Base(graph, mini, files, *outputs, named={"mllm": files})
    graph.note(1, height=250)
    negative = _negative(base, 2)
    canvas = _canvas(base, 2, (128, 128))
    for name, prompt, strength in (
        ("new_context", "A cup on the moon.", 1.0),
        ("new_texture", "A cup made of wood on the moon.", 0.4),
    ):
        subject = _extract(base, mini.out("image"), mini.out("mask"), prompt, save=False)
        applied = graph.add(
            "MoMAApplySubject",
            2,
            model=outputs[0],
            clip=base.clip,
            vae=base.vae,
            subject=subject,
            strength=strength,
            asks=("strength",),
        )
        base.model = applied.out("model")
        sampler = _sampler(base, (applied.out("positive"), negative), 3, canvas, steps=20, cfg=4.0)
        decoded = graph.add("VAEDecode", 4, samples=sampler.out("LATENT"), vae=base.vae)
        graph.add("SaveImage", 4, images=decoded.out("IMAGE"), filename_prefix=f"MoMA/try_it_{name}", tall=300)
    return graph


def simple() -> Graph:
    """One subject and one prompt, in as few nodes as they need."""
    graph = Graph("simple", WIDTHS)
    checkpoint = graph.add("CheckpointLoaderSimple", 0, ckpt_name=CHECKPOINT.name, models=[CHECKPOINT])
    image = _picture(graph, title=PAINT)
    files = graph.add("MoMALoad", 0, model_name="MoMA_llava_7b", adapter_name=ADAPTER)
    named = {"mllm": files}
    base = Base(
        graph, checkpoint, files, checkpoint.out("MODEL"), checkpoint.out("CLIP"), checkpoint.out("VAE"), named=named
    )
    subject = _extract(base, image.out("IMAGE"), image.out("MASK"), BEACH, save=False)
    graph.note(1, height=250)
    applied = graph.add(
        "MoMAApplySubject",
        2,
        model=base.model,
        clip=base.clip,
        vae=base.vae,
        subject=subject,
        strength=1.0,
        asks=("strength",),
    )
    base.model = applied.out("model")
    sampler = _sampler(base, (applied.out("positive"), _negative(base, 2)), 3, _canvas(base, 3))
    decoded = graph.add("VAEDecode", 3, samples=sampler.out("LATENT"), vae=base.vae)
    graph.add("SaveImage", 4, images=decoded.out("IMAGE"), filename_prefix="MoMA/simple", tall=440)
    return graph


def new_context() -> Graph:
    """The same subject somewhere else."""
    return _one_subject("new_context", BEACH, 1.0)


def new_texture() -> Graph:
    """The same shape, made of something else."""
    return _one_subject("new_texture", "A wooden sculpture of a cup on the table.", 0.4)


def from_subject() -> Graph:
    """A saved subject, without the language model."""
    graph = Graph("from_subject", WIDTHS)
    base = _loaders(graph)
    loaded = _saved_subject(graph, id=5)
    base.subject = loaded.out("subject")
    encoded = _encode(base, asks=("prompt",))
    _patch(base)
    _sample(base, encoded, "from_subject")
    graph.note(1, height=330)
    return graph


def auto_mask() -> Graph:
    """The mask comes from background removal."""
    graph = Graph("auto_mask", WIDTHS)
    base = _loaders(graph, mllm=True)
    image = _picture(graph)
    remover = graph.add("LoadBackgroundRemovalModel", 0, bg_removal_name=BIREFNET.name, models=[BIREFNET])
    removed = graph.add(
        "RemoveBackground",
        1,
        bg_removal_model=remover.out("bg_model"),
        image=image.out("IMAGE"),
        title="Subject's mask",
    )
    _extract(base, image.out("IMAGE"), removed.out("mask"), BEACH)
    graph.note(1, height=250)
    encoded = _encode(base)
    _patch(base)
    _sample(base, encoded, "auto_mask")
    return graph


def two_subjects() -> Graph:
    """Two subjects, each in its half of the picture."""
    graph = Graph("two_subjects", (340, 380, 300, 340, 380, 300, 340))
    base = _loaders(graph, mllm=True)
    width, height = 768, 512
    subjects = []
    for word, prompt in (("cup", "A cup on a wooden table."), ("vase", "A vase on a wooden table.")):
        image = _picture(graph, title=f"The {word} (paint the mask here)")
        extracted = _extract(base, image.out("IMAGE"), image.out("MASK"), prompt, word=word, save=False)
        subjects.append((word, extracted))
    graph.note(1, height=330)
    full = graph.add("SolidMask", 2, value=0.0, width=width, height=height, title="Black canvas")
    half = graph.add("SolidMask", 2, value=1.0, width=width // 2, height=height, title="White half")
    combined: Output | None = None
    masks = []
    for number, (word, _) in enumerate(subjects):
        masks.append(
            graph.add(
                "MaskComposite",
                2,
                destination=full.out("MASK"),
                source=half.out("MASK"),
                x=number * width // 2,
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
    _sample(base, (combined, negative), "two_subjects", size=(width, height), columns=(5, 6))
    return graph


def pose() -> Graph:
    """A ControlNet says how the subject stands."""
    graph = Graph("pose", (340, 380, 380, 340, 300, 340))
    base = _loaders(graph, mllm=True)
    image = _picture(graph, title=PAINT)
    _extract(base, image.out("IMAGE"), image.out("MASK"), "A teddy bear dancing in a park.", word="teddy bear")
    graph.note(1, height=300)
    positive, negative = _encode(base)
    _patch(base)
    net = graph.add("ControlNetLoader", 3, control_net_name=OPENPOSE.name, models=[OPENPOSE])
    pose_image = _picture(graph, 3, title="Pose (an OpenPose skeleton)")
    applied = graph.add(
        "ControlNetApplyAdvanced",
        3,
        positive=positive,
        negative=negative,
        control_net=net.out("CONTROL_NET"),
        image=pose_image.out("IMAGE"),
        strength=0.8,
    )
    conditioning = (applied.out("positive"), applied.out("negative"))
    _sample(base, conditioning, "pose", size=(512, 768), columns=(4, 5))
    return graph


def style_lora() -> Graph:
    """A LoRA gives the style, MoMA the subject."""
    graph = Graph("style_lora", WIDTHS)
    base = _loaders(graph, mllm=True)
    lora = graph.add(
        "LoraLoader",
        0,
        model=base.model,
        clip=base.clip,
        lora_name="style.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
        title="Load LoRA (your SD1.5 style)",
    )
    base.model, base.clip = lora.out("MODEL"), lora.out("CLIP")
    image = _picture(graph, title=PAINT)
    _extract(base, image.out("IMAGE"), image.out("MASK"), "A watercolour painting of a cup on a table.")
    graph.note(1, height=270)
    encoded = _encode(base)
    _patch(base, strength=0.6)
    _sample(base, encoded, "style_lora")
    return graph


def hires_fix() -> Graph:
    """A second pass in twice the size."""
    graph = Graph("hires_fix", (340, 380, 380, 300, 300, 340))
    base = _loaders(graph, mllm=True)
    image = _picture(graph, title=PAINT)
    _extract(base, image.out("IMAGE"), image.out("MASK"), BEACH)
    graph.note(1, height=280)
    encoded = _encode(base)
    _patch(base)
    small = _sampler(base, encoded, 3, _canvas(base, 3), title="First pass")
    large = graph.add(
        "LatentUpscaleBy",
        4,
        samples=small.out("LATENT"),
        upscale_method="bislerp",
        scale_by=2.0,
        title="Twice the size",
    )
    second = _sampler(base, encoded, 4, large.out("LATENT"), denoise=0.5, steps=30, title="Second pass", asks=())
    _decode(base, second, "hires_fix", 4, 5)
    return graph


def prompts() -> Graph:
    """Several prompts for one subject in one run."""
    graph = Graph("prompts", (340, 380, 380, 300, 240, 340))
    base = _loaders(graph)
    loaded = _saved_subject(graph)
    base.subject = loaded.out("subject")
    graph.note(0, height=330)
    _patch(base, column=1)
    negative = _negative(base, 1)
    canvas = _canvas(base, 1)
    for number, text in enumerate(
        ("A cup on a beach at sunset.", "A cup in the snow.", "A cup on a desk in a library."), 1
    ):
        encoded = graph.add(
            "MoMATextEncode",
            2,
            clip=base.clip,
            subject=base.subject,
            prompt=text,
            title=f"Prompt {number}",
            asks=("prompt",),
        )
        sampler = _sampler(base, (encoded.out("positive"), negative), 3, canvas, title=f"Picture {number}")
        decoded = graph.add("VAEDecode", 4, samples=sampler.out("LATENT"), vae=base.vae)
        graph.add("SaveImage", 5, images=decoded.out("IMAGE"), filename_prefix=f"MoMA/prompt_{number}")
    return graph


def strength_study() -> Graph:
    """One sheet over strength and weight."""
    graph = Graph("strength_study", (340, 380, 380, 620))
    base = _loaders(graph, mllm=True)
    image = _picture(graph, title=PAINT)
    _extract(base, image.out("IMAGE"), image.out("MASK"), BEACH)
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
        steps=30,
        cfg=7.5,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        control_after_generate="fixed",
        asks=("strengths", "weights", "seed"),
    )
    graph.add("SaveImage", 3, images=study.out("sheet"), filename_prefix="MoMA/strength_study", tall=420)
    graph.note(3, height=190)
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
    "Picture, mask, word and prompt in; a new picture of that subject out (MoMA).",
    "Personalization",
)


def personalize() -> tuple[Graph, list[Port], list[Port]]:
    """The blueprint: the graph inside, what its node takes and what it gives."""
    graph = Graph("personalize", WIDTHS)
    base = _loaders(graph, mllm=True)
    extract = graph.add(
        "MoMAExtractSubject",
        1,
        mllm=base.named["mllm"].out("mllm"),
        adapter=base.adapter.out("adapter"),
        image=OUTSIDE,
        subject="cup",
        prompt=BEACH,
    )
    base.subject = extract.out("subject")
    encoded = _encode(base)
    _patch(base)
    sampler = _sampler(base, encoded, 3, _canvas(base, 3))
    decoded = graph.add("VAEDecode", 3, samples=sampler.out("LATENT"), vae=base.vae)
    mask = graph.add("MoMASubjectMask", 4, model=base.model, latent=sampler.out("LATENT"))
    canvas = next(node for node in graph.nodes if node.kind == "EmptyLatentImage")
    inputs = [
        Port("image", [(extract, "image")]),
        Port("mask", [(extract, "mask")]),
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


OUTSIDE = object()
"""Marks an input that the blueprint's own input is connected to."""


def _one_subject(name: str, prompt: str, strength: float) -> Graph:
    graph = Graph(name, WIDTHS)
    checkpoint = graph.add("CheckpointLoaderSimple", 0, ckpt_name=CHECKPOINT.name, models=[CHECKPOINT])
    image = _picture(graph, title=PAINT)
    base = _loaders(graph, mllm=True, checkpoint=checkpoint)
    _extract(base, image.out("IMAGE"), image.out("MASK"), prompt, save=False)
    encoded = _encode(base)
    _patch(base, strength=strength)
    _sample(base, encoded, name)
    assert base.subject is not None
    graph.add("MoMASaveSubject", 1, subject=base.subject, filename_prefix="cup")
    graph.note(1, height=290)
    return graph


def _loaders(graph: Graph, mllm: bool = False, checkpoint: Node | None = None) -> Base:
    if checkpoint is None:
        checkpoint = graph.add("CheckpointLoaderSimple", 0, ckpt_name=CHECKPOINT.name, models=[CHECKPOINT])
    named = {}
    if mllm:
        named["mllm"] = graph.add("MoMALoadMLLM", 0, model_name="MoMA_llava_7b")
    own_id = None if mllm else 4
    adapter = graph.add("MoMALoadAdapter", 0, id=own_id, adapter_name=ADAPTER)
    outputs = (checkpoint.out("MODEL"), checkpoint.out("CLIP"), checkpoint.out("VAE"))
    return Base(graph, checkpoint, adapter, *outputs, named=named)


def _picture(graph: Graph, column: int = 0, **values: Any) -> Node:
    return graph.add("LoadImage", column, image="example.png", asks=("image",), **values)


def _saved_subject(graph: Graph, **values: Any) -> Node:
    return graph.add("MoMALoadSubject", 0, subject_name="cup_00001_.safetensors", asks=("subject_name",), **values)


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


def _canvas(base: Base, column: int, size: tuple[int, int] = (512, 512)) -> Output:
    return base.graph.add("EmptyLatentImage", column, width=size[0], height=size[1]).out("LATENT")


def _sampler(base: Base, encoded: tuple[Output, Output], column: int, latent: Output, **values: Any) -> Node:
    positive, negative = encoded
    # Room for the line of text that the node shows while it runs.
    settings = {**SAMPLING, "control_after_generate": "randomize", "tall": 330, "asks": ("seed",), **values}
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
    size: tuple[int, int] = (512, 512),
    columns: tuple[int, int] = (3, 4),
) -> None:
    sampler = _sampler(base, encoded, columns[0], _canvas(base, columns[0], size))
    _decode(base, sampler, name, *columns)
