"""Many runs through a real server: lists of seeds, a cache that lets go of models, studies that grow."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.subject.file import save_subject
from tiny_scene_pack import add_tiny_scene_pack

from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, Run
from workbench.scene import tiny_adapter, tiny_subject
from workbench.tiny_models import adapter_groups

pytestmark = pytest.mark.server
SETTINGS = {"steps": 1, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """With the tiny models, a real adapter file and a saved subject; its cache keeps what no prompt uses any more."""
    base = tmp_path_factory.mktemp("many")
    models, subjects = base / "models" / "moma", base / "output" / "moma_subjects"
    models.mkdir(parents=True)
    subjects.mkdir(parents=True)
    torch.save(adapter_groups(embedding=48), models / "tiny.th")
    save_subject(tiny_subject(tiny_adapter(), size=512), subjects / "car.safetensors")
    add_tiny_scene_pack(base)
    with ComfyServer(comfyui_path(), base, arguments=("--cpu", "--cache-lru", "400")) as started:
        yield started


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def scene() -> Prompt:
    return {
        "models": node("TinyModels"),
        "adapter": node("MoMALoadAdapter", adapter_name="tiny.th"),
        "subject": node("MoMALoadSubject", subject_name="car.safetensors"),
        "positive": node(
            "MoMATextEncode", clip=["models", 1], subject=["subject", 0], prompt="A car.", template="{prompt}"
        ),
        "negative": node("CLIPTextEncode", clip=["models", 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }


def sampled(**inputs: Any) -> Prompt:
    applied = node(
        "MoMAApplyAdapter",
        model=["models", 0],
        adapter=["adapter", 0],
        subject=["subject", 0],
        weight=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    prompts = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    sampler = node("KSampler", model=["apply", 0], **prompts, **{**SETTINGS, "seed": 1, **inputs})
    shown = node("MoMASubjectMask", model=["apply", 0], latent=["sampler", 0])
    return {**scene(), "apply": applied, "sampler": sampler, "mask": shown}


def kinds(prompt: Prompt, run: Run) -> set[str]:
    """The classes of the nodes that ran; cells of a study are named by the study."""
    return {prompt[name]["class_type"] for name in run.executed if name in prompt}


def test_the_mask_of_the_first_of_64_seeds(server: ComfyServer) -> None:
    prompt = sampled(seed=["seeds", 0])
    prompt |= {"seeds": node("Seeds", count=64), "first": node("First", latents=["sampler", 0])}
    prompt["mask"]["inputs"]["latent"] = ["first", 0]
    assert server.run(prompt).files("mask")


def test_the_mask_is_there_after_comfyui_let_go_of_the_models(server: ComfyServer) -> None:
    prompt = sampled(seed=2)
    without = {name: content for name, content in prompt.items() if name != "mask"}
    without["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["models", 2])
    without["shown"] = node("PreviewImage", images=["decode", 0])
    server.run(without)
    (gone,) = server.run({"forget": node("ForgetModels", number=1)}).outputs["forget"]["text"]
    assert "Adapter" in gone and "VAE" in gone
    run = server.run(prompt)
    assert "MoMAApplyAdapter" in kinds(prompt, run) and not kinds(prompt, run) & {"KSampler", "MoMALoadSubject"}
    assert run.files("mask")


def test_a_latent_that_no_run_gave_is_refused(server: ComfyServer) -> None:
    prompt = sampled(seed=3)
    prompt["mask"]["inputs"]["latent"] = ["latent", 0]
    with pytest.raises(ExecutionFailedError, match=r"^MoMASubjectMask: latent is not the result of a sampler that ran"):
        server.run(prompt)


def study(strengths: str, weights: str = "1.0", **changes: Any) -> Prompt:
    prompt = scene()
    inputs = {"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "latent_image": ["latent", 0]}
    links = {name: [name, 0] for name in ("adapter", "subject", "positive", "negative")}
    numbers = {"strengths": strengths, "weights": weights, "seed": 5, **SETTINGS, **changes}
    prompt["study"] = node("MoMAStrengthStudy", **inputs, **links, **numbers)
    prompt["sheet"] = node("PreviewImage", images=["study", 0])
    return prompt


def samplers(run: Run) -> int:
    """How many samplers of the study ran."""
    return len({name for name in run.executed if "sampler-" in name})


def test_a_study_computes_only_what_is_new(server: ComfyServer) -> None:
    counts = [
        samplers(server.run(study(*numbers)))
        for numbers in (
            ("0.4, 0.7",),
            ("0.4, 0.7, 1.0",),  # one more
            ("1.0, 0.4",),  # in another order, one less
            ("0.40, .7",),  # written differently
            ("0.4, 0.7", "1.0, 0.5"),  # one more row
            ("0.4", "0.5, 1"),
        )
    ]
    assert counts == [2, 1, 0, 0, 2, 0]
    assert samplers(server.run(study("0.4, 0.7", seed=6))) == 2, "another seed is another picture"


def test_a_study_of_lists(server: ComfyServer) -> None:
    """Each item makes a study of its own, also where what is connected are objects; and they are known again."""
    prompt = study("0.4, 0.7", seed=["seeds", 0])
    prompt["seeds"] = node("Seeds", count=2)
    prompt["subjects"] = node("Twice", value=["subject", 0])
    prompt["study"]["inputs"]["subject"] = ["subjects", 0]
    prompt["cells"] = node("PreviewImage", images=["study", 1])
    run = server.run(prompt)
    assert samplers(run) == 4 and len(run.files("cells")) == 4 and len(run.files("sheet")) == 2
    prompt["study"]["inputs"]["strengths"] = "0.7, 0.9"
    assert samplers(server.run(prompt)) == 2


def test_a_study_of_a_batch_is_refused_before_it_samples(server: ComfyServer) -> None:
    prompt = study("0.4, 0.7", seed=7)
    prompt["latent"]["inputs"]["batch_size"] = 2
    with pytest.raises(ExecutionFailedError, match=r"^MoMAStrengthStudy: latent_image holds 2 latents; the study"):
        server.run(prompt)
