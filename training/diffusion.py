"""Stage 2: text to picture. SD1.5's text encoder and UNet in small, trained together on the stock noise schedule."""

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.tiny_models import unet_config

from .data import caption_of, latent_mask, scene_of, to_tensor
from .latents import Latents
from .localised import WordAttention, word_places
from .loop import Plan, Start, Training
from .painter import paint
from .shapes import pair_loss, pair_noise, pair_steps, shape_pair
from .vae import initialise, save_sheet
from .words import PLACE_WORDS, SYNONYMS, caption
from .world import CLASSES, PLACES, Scene

CONTEXT = 64
UNET = {"block_out_channels": [96, 96, 96, 96], "cross_attention_dim": CONTEXT}
"""SD1.5's layout in small."""

HEADS = 2
"""Of the UNet's attention: with SD1.5's 8, of 12 channels each, a step would take half as long again on a CPU."""
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "num_hidden_layers": 3,
    "hidden_size": CONTEXT,
    "num_attention_heads": 4,
    "intermediate_size": 4 * CONTEXT,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
PLAN = Plan(samples=1_000_000, batch=32, rate=1.5e-3, warm_up=50, ema=0.995, muon=4e-3)
LOCALISED = 0.1
"""Weight of the loss that asks the attention to the class's word all over the thing, see `localised.py`."""

SHAPED_SHARE, SHAPES = 0.25, 0.1
"""Of a batch's rows: so many are pairs that differ in shape alone, see `shapes.py`, and the weight of their loss."""

_NO_TEXT = 0.1
"""How often the text is left out, for classifier-free guidance."""
_START = 49406
"""The first of CLIP's tokens that are not of a word."""

_MIN_SNR = 5.0
"""Min-SNR weighting's gamma (Hang et al., arXiv 2303.09556)."""


class TextToImage(nn.Module):
    """The text encoder and the UNet."""

    def __init__(self) -> None:
        """Build both and draw their weights.

        The text encoder is transformers': ComfyUI's, which runs it later, adds in place and so cannot be trained.
        """
        import comfy.ops
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))
        self.unet = UNetModel(**unet_config(UNET) | {"num_heads": HEADS}, operations=comfy.ops.disable_weight_init)
        initialise(self.unet)
        for name, part in self.unet.named_modules():
            if name.endswith(("proj_out", "out_layers.3")) or name == "out.2":
                nn.init.zeros_(part.weight)

    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Text embeddings [N, 77, context] as SD1.5 gets them."""
        tokens = torch.stack([_tokens(text) for text in texts]).to(device)
        return self.text(input_ids=tokens).last_hidden_state

    def forward(self, noisy: Tensor, steps: Tensor, context: Tensor, seen: WordAttention | None = None) -> Tensor:
        """The noise in `noisy` [B, 4, h, w] at these of the 1000 steps; `seen` is shown every layer's attention."""
        options = {"optimized_attention_override": functools.partial(_attention, seen)}
        return self.unet(noisy, steps, context, transformer_options=options)


def _attention(
    seen: WordAttention | None, attention: Any, q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any
) -> Tensor:
    """Attention, on a CPU in float32: its backward pass in bfloat16 is three times slower there."""
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        if seen is not None:
            seen.see(q, k, more[0] if more else options["heads"])
        return attention(q, k, v, *more, **options)


def signal_shares() -> Tensor:
    """SD1.5's cumulated alphas [1000]: the share of the signal's variance at each step."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def draw_steps(count: int) -> Tensor:
    """Steps to train at [count]: half anywhere, half where small latents lose their signal."""
    anywhere = torch.randint(0, 1000, (count,))
    middle = (400 + 180 * torch.randn(count)).round().long()
    chosen = torch.where(torch.rand(count) < 0.5, anywhere, middle)
    return torch.where((chosen < 0) | (chosen > 999), anywhere, chosen)


def noised(latents: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, 4, h, w] with noise, as the schedule has them at these steps."""
    share = signal_shares().to(latents.device)[steps].view(-1, 1, 1, 1)
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def loss_weights(steps: Tensor) -> Tensor:
    """Weights of the squared errors at these steps, 1 on average about."""
    share = signal_shares().to(steps.device)[steps]
    ratio = share / (1 - share)
    return ratio.clamp(max=_MIN_SNR) / ratio


def train(
    folder: Path, latents: Latents, vae: Any, device: torch.device, plan: Plan = PLAN, start: Start | None = None
) -> TextToImage:
    """Train, or go on, until the plan is fulfilled: the averaged model.

    Args:
        latents: Of the training pictures.
        vae: Encodes the pairs that differ in shape, and decodes the sample sheet.
    """
    torch.manual_seed(0)
    training = Training(TextToImage(), plan, folder, device, start=start)
    model: Any = training.module

    def noise_in(noisy: Tensor, steps: Tensor, texts: list[str], seen: WordAttention | None = None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(noisy, steps, model.encode(texts, device), seen).float()

    pairs = int(plan.batch * SHAPED_SHARE / 2)
    count = plan.batch - 2 * pairs

    def loss_of(seen: int) -> Tensor:
        numbers = torch.randint(0, len(latents), (count,))
        clean = latents.take(numbers).to(device)
        texts = [caption_of(int(number), seen + i) for i, number in enumerate(numbers)]
        texts = ["" if drop else text for text, drop in zip(texts, torch.rand(count) < _NO_TEXT, strict=True)]
        attended = _word_attention([int(number) for number in numbers], texts, device)
        steps, noise = draw_steps(count).to(device), torch.randn(clean.shape).to(device)
        guess = noise_in(noised(clean, steps, noise), steps, texts, attended)
        errors = (guess - noise).square().mean(dim=(1, 2, 3))
        return (errors * loss_weights(steps)).mean() + LOCALISED * attended.loss + SHAPES * of_shapes(seen)

    def of_shapes(seen: int) -> Tensor:
        rows = [row for i in range(pairs) for row in _told_pair(random.Random(f"shapes {seen + i}"))]
        clean = latents.encoded(torch.stack([to_tensor(paint(scene)[0]) for scene, _ in rows]), vae, device)
        steps, noise = pair_steps(pairs).to(device), pair_noise(clean)
        guess = noise_in(noised(clean, steps, noise), steps, [text for _, text in rows])
        return pair_loss((guess - noise).square(), clean, signal_shares().to(device)[steps])

    training.run(loss_of, lambda: _sheet(training, latents, vae, folder / "samples.png"))
    return training.averaged_module()


def _told_pair(rng: random.Random) -> list[tuple[Scene, str]]:
    """Two scenes that differ in a shape alone, and what is said of each: of the shape too, unless it is a bare word."""
    scenes, seed = shape_pair(rng), rng.random()
    return [(scene, caption(scene, random.Random(seed), shaped_share=1)) for scene in scenes]


@torch.no_grad()
def sample(model: TextToImage, texts: list[str], device: torch.device, steps: int = 25, scale: float = 4.0) -> Tensor:
    """Latents [N, 4, 16, 16] for these texts by DDIM with classifier-free guidance; the same noise every time."""
    shares = signal_shares().to(device)
    context = torch.cat([model.encode(texts, device), model.encode([""] * len(texts), device)])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(texts), 4, 16, 16, generator=generator).to(device)
    times = torch.linspace(999, 0, steps + 1).long().tolist()
    for now, then in itertools.pairwise(times):
        step = torch.full((2 * len(texts),), now, device=device)
        positive, negative = model(torch.cat([x, x]), step, context).float().chunk(2)
        noise = negative + scale * (positive - negative)
        clean = (x - (1 - shares[now]).sqrt() * noise) / shares[now].sqrt()
        share = shares[then] if then > 0 else torch.ones((), device=device)
        x = share.sqrt() * clean + (1 - share).sqrt() * noise
    return x


@torch.no_grad()
def _sheet(training: Training, latents: Latents, vae: Any, path: Path) -> None:
    """Each class in three places."""
    model = TextToImage().to(training.device).eval()
    model.load_state_dict(training.averaged())
    rows = []
    for shift in range(3):
        places = [PLACES[(i + 3 * shift) % len(PLACES)] for i in range(len(CLASSES))]
        words = [SYNONYMS[name][0] for name in CLASSES]
        texts = [
            f"photo of a {word}. A {word} {PLACE_WORDS[place][0]}." for word, place in zip(words, places, strict=True)
        ]
        rows.append(vae.decode(latents.unscaled(sample(model, texts, training.device))))
    save_sheet(path, rows)


@functools.cache
def _tokenizer() -> Any:
    from comfy.sd1_clip import SDTokenizer

    return SDTokenizer()


def _word_attention(numbers: list[int], texts: list[str], device: torch.device) -> WordAttention:
    """For these pictures and what is said of them."""
    scenes = [scene_of(number) for number in numbers]
    places = [
        word_places(_tokens(text).tolist(), scene.subject.name, _word_tokens)
        for scene, text in zip(scenes, texts, strict=True)
    ]
    masks = torch.stack([latent_mask(paint(scene)[1]) for scene in scenes])
    return WordAttention(torch.tensor(places).to(device), masks.to(device))


def _word_tokens(word: str) -> list[int]:
    return [token for token, _ in _tokenizer().tokenize_with_weights(word)[0] if token < _START]


@functools.lru_cache(maxsize=200_000)
def _tokens(text: str) -> Tensor:
    """CLIP's tokens of a text [77]."""
    return torch.tensor([token for token, _ in _tokenizer().tokenize_with_weights(text)[0]])
