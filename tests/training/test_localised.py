"""The loss that asks the attention to a word onto the thing that it names."""

import math
import re

import pytest
import torch
from comfyui_moma.training import data, diffusion
from comfyui_moma.training.localised import WordAttention, word_places
from comfyui_moma.training.words import SYNONYMS
from comfyui_moma.training.world import CLASSES

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
LEFT = torch.zeros(1, 4, 4)
LEFT[:, :, :2] = 1
WORD = torch.tensor([[False, True, False]])


def seen(places: torch.Tensor) -> float:
    """The loss of one layer where the word is attended to at these places [4, 4], by two heads."""
    keys = torch.zeros(1, 3, 4)
    keys[0, 1] = 1.0
    attention = WordAttention(WORD, LEFT)
    attention.see(40 * (places.flatten()[None, :, None] - 0.5).expand(1, 16, 4), keys, 2)
    return float(attention.loss)


def test_it_is_the_divergence_from_an_even_cover_of_the_thing() -> None:
    assert seen(LEFT[0]) == pytest.approx(0, abs=1e-4)
    assert seen(torch.ones(4, 4)) == pytest.approx(math.log(2), abs=1e-4)
    assert seen(1 - LEFT[0]) > 10
    one_place = torch.zeros(4, 4)
    one_place[0, 0] = 1
    assert seen(one_place) > 5, "on the thing, but on one place of it"


def test_layers_without_text_and_rows_without_the_word_do_not_count() -> None:
    attention = WordAttention(torch.cat([WORD, ~WORD & WORD]), torch.cat([LEFT, LEFT]))
    attention.see(torch.randn(2, 16, 4), torch.randn(2, 16, 4), 2)
    assert not attention.losses
    q, k = torch.randn(2, 16, 4), torch.randn(2, 3, 4)
    alone = WordAttention(WORD, LEFT)
    attention.see(q, k, 2)
    alone.see(q[:1], k[:1], 2)
    assert attention.loss == pytest.approx(float(alone.loss))


@pytest.mark.parametrize("kind", CLASSES)
def test_the_word_is_found_in_every_caption(kind: str) -> None:
    numbers = [number for number in range(200) if data.scene_of(number).subject.name == kind]
    assert numbers
    for number in numbers:
        text = data.caption_of(number, 0)
        places = word_places(diffusion._tokens(text).tolist(), kind, diffusion._word_tokens)
        named = max(len(re.findall(rf"\b{word}\b", text.lower())) for word in SYNONYMS[kind])
        assert sum(places) >= named >= 1, text
    assert not any(word_places(diffusion._tokens("").tolist(), kind, diffusion._word_tokens))


def test_training_on_it_moves_the_attention_onto_the_thing() -> None:
    torch.manual_seed(0)
    model = diffusion.TextToImage()
    numbers = list(range(4))
    texts = [data.caption_of(number, 0) for number in numbers]
    noisy, steps = torch.randn(4, 4, 16, 16), torch.full((4,), 400)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        attention = diffusion._word_attention(numbers, texts, CPU)
        model(noisy, steps, model.encode(texts, CPU), attention)
        assert len(attention.losses) == 16, "one for each cross-attention"
        optimizer.zero_grad()
        attention.loss.backward()
        optimizer.step()
        losses.append(float(attention.loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
