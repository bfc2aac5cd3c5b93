"""MoMA Strength Study, MoMA Contact Sheet."""

from typing import Any

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder, is_link
from comfy_execution.utils import get_executing_context

from ..moma_modules.host.pictures import contact_sheet, picture, rgb
from ..moma_modules.sampling.study import Study, parse_study
from .samplers import sampling_inputs
from .types import CATEGORY, KEEPS_PREVIEW, MomaAdapter, MomaSubject

MOST_PICTURES = 36


class StrengthStudy(io.ComfyNode):
    """Expands into stock samplers, one for each strength and weight.

    What is connected goes into the expansion as links. ComfyUI knows a cell of an earlier study again by what it is
    connected to; a node that holds objects it never knows again, and all would be computed anew.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAStrengthStudy",
            display_name="MoMA Strength Study",
            category=CATEGORY,
            search_aliases=["XY plot", "strength sweep", "compare strengths"],
            description="One labelled sheet over the shortcut's strength and the adapter's weight, all with the same "
            "seed. It stands for Apply MoMA Adapter, Self-Attn Shortcut, KSampler and VAE Decode, once per picture.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, not yet through Apply MoMA Adapter for this subject."),
                MomaAdapter.Input("adapter", tooltip="From Load MoMA Adapter or Load MoMA."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                io.Vae.Input("vae", tooltip="The VAE of the SD1.5 checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the SD1.5 checkpoint."),
                io.Conditioning.Input("positive", tooltip="From MoMA Text Encode."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from any text encoder."),
                io.Latent.Input("latent_image", tooltip="One latent, as of Empty Latent Image; it sets the size."),
                io.String.Input(
                    "strengths",
                    default="0.4, 0.7, 1.0",
                    tooltip="Strengths of Self-Attn Shortcut, 0 to 2, separated by commas: one column each.",
                ),
                io.String.Input(
                    "weights",
                    default="1.0",
                    tooltip="Weights of Apply MoMA Adapter, 0 to 3, separated by commas: one row each. At most "
                    f"{MOST_PICTURES} pictures together.",
                ),
                *sampling_inputs(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The labelled sheet, one picture."),
                io.Image.Output(
                    "images", display_name="images", tooltip="The pictures as a batch, row by row, without labels."
                ),
            ],
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None, weights: str | None = None) -> bool | str:
        if strengths is None or weights is None:  # connected: known only when it runs
            return True
        try:
            parse_study(strengths, weights, MOST_PICTURES)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Any,
        subject: Any,
        vae: Any,
        clip: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        strengths: str,
        weights: str,
        **sampling: Any,
    ) -> io.NodeOutput:
        study = parse_study(strengths, weights, MOST_PICTURES)
        count = latent_image["samples"].shape[0]
        if count != 1:
            raise ValueError(
                f"latent_image holds {count} latents; the study takes one. Set batch_size to 1, or choose one with "
                "'Latent From Batch'."
            )
        graph = GraphBuilder()
        objects = {"model": model, "adapter": adapter, "subject": subject, "vae": vae, "clip": clip}
        objects |= {"positive": positive, "negative": negative, "latent_image": latent_image}
        sheet = _sheet(graph, study, cls._links(graph, objects), sampling)
        return io.NodeOutput(sheet.out(0), sheet.out(1), expand=graph.finalize())

    @classmethod
    def _links(cls, graph: GraphBuilder, objects: dict[str, Any]) -> dict[str, Any]:
        """For each input the link to what it holds in this call; what is not connected stays an object.

        With lists ComfyUI calls the node once for each of their items, and a link means the whole list.
        """
        context, prompt = get_executing_context(), cls.hidden.dynprompt
        if context is None or prompt is None:
            return objects
        connected = prompt.get_node(cls.hidden.unique_id)["inputs"]
        links = dict(objects)
        for name in objects:
            if is_link(connected.get(name)):
                index = context.list_index or 0
                item = graph.node(ListItem.ID, f"{name}-{index}", values=connected[name], index=index)
                links[name] = item.out(0)
        return links


def _sheet(graph: GraphBuilder, study: Study, given: dict[str, Any], sampling: dict[str, Any]) -> Any:
    """Put a sampler for each cell of the study into a graph, and the sheet, which is returned.

    Args:
        given: The study's inputs by name: links, or the objects themselves.
        sampling: Inputs of KSampler, passed on.
    """
    shared = {name: given[name] for name in ("adapter", "subject")}
    prompts = {name: given[name] for name in ("positive", "negative", "latent_image")}
    window = {"end_percent": 1.0}
    pictures = {}
    for weight in study.weights:
        applied = graph.node(
            "MoMAApplyAdapter",
            f"apply-{weight}",
            model=given["model"],
            weight=weight,
            start_percent=0.0,
            **window,
            **shared,
        )
        for strength in study.strengths:
            cell = f"{weight}-{strength}"
            patched = graph.node(
                "MoMASelfAttnShortcut",
                f"shortcut-{cell}",
                model=applied.out(0),
                vae=given["vae"],
                clip=given["clip"],
                strength=strength,
                start_percent=0.05,
                seed=0,
                **window,
                **shared,
            )
            sampled = graph.node("KSampler", f"sampler-{cell}", model=patched.out(0), **prompts, **sampling)
            decoded = graph.node("VAEDecode", f"decode-{cell}", samples=sampled.out(0), vae=given["vae"])
            pictures[f"images.image{len(pictures)}"] = decoded.out(0)
    return graph.node(
        "MoMAContactSheet",
        "sheet",
        columns=", ".join(f"strength {value:g}" for value in study.strengths),
        rows=", ".join(f"weight {value:g}" for value in study.weights),
        **pictures,
    )


class ListItem(io.ComfyNode):
    """One item of a list of anything; the last one where the list is shorter, as ComfyUI repeats it."""

    ID = "_MoMAListItem"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.ID,
            display_name="MoMA List Item",
            category=CATEGORY,
            description="A part of MoMA Strength Study.",
            inputs=[io.AnyType.Input("values"), io.Int.Input("index", default=0, min=0)],
            outputs=[io.AnyType.Output("item")],
            is_input_list=True,
            is_dev_only=True,
        )

    @classmethod
    def execute(cls, values: list[Any], index: list[int]) -> io.NodeOutput:
        return io.NodeOutput(values[min(index[0], len(values) - 1)])


class ContactSheet(io.ComfyNode):
    """Pictures in labelled rows and columns."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.Autogrow.TemplatePrefix(io.Image.Input("image"), prefix="image", min=1, max=MOST_PICTURES)
        return io.Schema(
            node_id="MoMAContactSheet",
            display_name="MoMA Contact Sheet",
            category=CATEGORY,
            search_aliases=["image grid", "grid", "labels", "collage"],
            description="Puts pictures on one labelled sheet, row by row. MoMA Strength Study uses it; it takes any "
            "pictures.",
            inputs=[
                io.Autogrow.Input(
                    "images", template=template, tooltip="Pictures of one size, row by row; batches count one by one."
                ),
                io.String.Input(
                    "columns", default="", tooltip="The labels above, separated by commas: as many columns as labels."
                ),
                io.String.Input(
                    "rows", default="", tooltip="The labels at the left, separated by commas. Empty: none."
                ),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The labelled sheet, one picture."),
                io.Image.Output("images", display_name="images", tooltip="The pictures as a batch, row by row."),
            ],
            **KEEPS_PREVIEW,
        )

    @classmethod
    def execute(cls, images: dict[str, torch.Tensor], columns: str, rows: str) -> io.NodeOutput:
        given = [rgb(images[name]) for name in sorted(images, key=lambda name: int(name.removeprefix("image")))]
        if len({tuple(image.shape[1:]) for image in given}) > 1:
            sizes = ", ".join(f"{image.shape[2]}x{image.shape[1]}" for image in given)
            raise ValueError(f"images have different sizes: {sizes}. Resize them to one size first.")
        batch = torch.cat(given)
        if not len(batch):
            raise ValueError("images holds no picture: connect at least one.")
        across = [label.strip() for label in columns.split(",")] if columns.strip() else [""] * len(batch)
        grid = [[picture(image) for image in part] for part in batch.split(len(across))]
        down = [label.strip() for label in rows.split(",")] if rows.strip() else [""] * len(grid)
        if len(grid[-1]) != len(across) or len(down) != len(grid):
            raise ValueError(
                f"images holds {len(batch)} pictures, which do not fill {len(across)} columns and {len(down)} rows. "
                "Give one label per column and per row."
            )
        sheet = contact_sheet(grid, across, down)
        return io.NodeOutput(sheet, batch, ui=ui.PreviewImage(sheet, cls=cls))
