"""Where the subject is in the picture: the mask from attention."""

import numpy as np
import torch
from comfyui_moma.moma_modules.sampling.subject_mask import subject_mask, token_attention, token_values
from hypothesis import given, settings
from hypothesis import strategies as st


def brute_force_mask(maps: np.ndarray) -> np.ndarray:
    """As the released code has it, literally: [2, N] negative and positive to the positive mask [N]."""
    values = (maps - maps.min()) / (maps.max() - maps.min())
    values = np.where(values <= 0.2, 0.0, values)
    return ((values - values.min()) / (values.max() - values.min()))[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_the_mask_is_that_of_the_spec(seed: int, size: int) -> None:
    maps = torch.rand(2, size, generator=torch.Generator().manual_seed(seed))
    ours = subject_mask(maps, torch.ones_like(maps, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(ours, brute_force_mask(maps.numpy()), atol=1e-6)


def test_a_constant_map_is_no_mask_and_uncovered_places_do_not_count() -> None:
    covered = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(subject_mask(torch.full((2, 6), 0.3), covered), torch.ones(6))
    maps = torch.rand(2, 6)
    covered[:, 4:] = False
    maps[:, 4:] = 99.0
    mask = subject_mask(maps, covered)
    assert torch.equal(mask[4:], torch.zeros(2))
    np.testing.assert_allclose(mask[:4], brute_force_mask(maps[:, :4].numpy()), atol=1e-6)


def test_attention_is_summed_over_tokens_and_averaged_over_heads() -> None:
    q, k = torch.randn(1, 5, 8), torch.randn(1, 7, 8)
    tokens = torch.zeros(1, 1, 7)
    tokens[..., [2, 3]] = 1
    heads = [(q[0, :, s] @ k[0, :, s].T / 2.0).softmax(-1)[:, [2, 3]].sum(-1) for s in (slice(0, 4), slice(4, 8))]
    expected = torch.stack(heads).mean(0)
    values = token_values(tokens, heads=2, head_size=4, dtype=torch.float32)
    assert torch.allclose(token_attention(q, k, values, 1)[0, :, 0], expected, atol=1e-6)
