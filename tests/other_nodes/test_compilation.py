"""TorchCompileModel: what is compiled is right, compiled once, and never taken for something else."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from compat_rows import message
from torch._dynamo.utils import counters

from workbench.scene import close, compiled, masks_of, moma, negative, positive, sample, tiny_shortcut

COMPILED = "unique_graphs"


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """Nothing compiled before, and nothing left for other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def with_pytorch_attention(model: Any) -> Any:
    """`--use-pytorch-cross-attention` for one model: a CPU's default attention cannot be compiled at once."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return clone


def scaled(model: Any, strength: float) -> Any:
    """Another pack's cross-attention replacement that can be compiled."""

    def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        return strength * attention_pytorch(q, k, v, extra_options["n_heads"])

    clone = model.clone()
    clone.set_model_attn2_replace(patch, "middle", 0)
    return clone


def newly_compiled() -> int:
    """How many graphs were compiled since the last call."""
    count = counters["stats"][COMPILED]
    counters.clear()
    return count


def assert_same(patched: Any, run: Any, subject: Any, **options: Any) -> None:
    """`run`, which is compiled, gives the picture and the mask of `patched`, which is not."""
    prompts = (positive(subject), negative())
    expected, found = (sample(model, *prompts, **options) for model in (patched, run))
    assert close(found, expected, 1e-5)
    ours, theirs = masks_of(run, found)[subject.key], masks_of(patched, expected)[subject.key]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.std() > 0.05


def test_one_compilation_serves_all_steps_and_later_runs(model: Any, adapter: Any, subject: Any) -> None:
    """Also with other weights, seeds and ranges, in either order, and beside the same checkpoint without MoMA."""
    plain = with_pytorch_attention(model)
    expected = sample(plain, positive(), negative())
    assert close(sample(compiled(plain), positive(), negative()), expected, 1e-5)
    assert newly_compiled() == 1

    patched = moma(plain, adapter, subject, shortcut=tiny_shortcut())
    assert_same(patched, compiled(patched), subject, steps=4)
    assert newly_compiled() == 1
    other = {"weight": 0.5, "shortcut": tiny_shortcut(0.3, start=0.4, end=0.7)}
    uncompiled, last = (moma(base, adapter, subject, **other) for base in (plain, compiled(plain)))
    assert_same(uncompiled, last, subject, steps=6, seed=9)
    assert close(sample(compiled(plain), positive(), negative()), expected, 1e-5)
    assert newly_compiled() == 0


@pytest.mark.slow
def test_what_changes_the_computation_is_noticed(model: Any, adapter: Any, subject: Any) -> None:
    """A part taken away, and another pack's patch in our slot with other settings."""
    plain = with_pytorch_attention(model)
    for parts in ({"shortcut": tiny_shortcut()}, {}):
        patched = moma(plain, adapter, subject, **parts)
        assert_same(patched, compiled(patched), subject)
    assert newly_compiled() == 2
    pictures = []
    for strength in (0.5, 2.0):
        patched = moma(scaled(plain, strength), adapter, subject)
        assert_same(patched, compiled(patched), subject)
        pictures.append(sample(patched, positive(subject), negative()))
    assert not close(*pictures, 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_where_torch_gives_up_the_run_goes_on(
    model: Any, adapter: Any, subject: Any, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With a CPU's default attention, which asks for free memory; other runs keep their compilation."""
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    run = moma(compiled(model), adapter, subject, shortcut=tiny_shortcut()) if first else compiled(patched)
    with caplog.at_level(logging.WARNING):
        found = sample(run, positive(subject), negative())
    assert torch.equal(found, sample(patched, positive(subject), negative()))
    assert [message("TorchCompileModel") in record.getMessage() for record in caplog.records].count(True) == 1
    assert newly_compiled() == 0
    assert run.get_wrappers("apply_model", "torch.compile")


@pytest.mark.slow
def test_too_many_kinds_of_runs_go_on_uncompiled(
    model: Any, adapter: Any, subject: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    plain = with_pytorch_attention(model)
    both = compiled(moma(plain, adapter, subject))
    for size in ((8, 8), (16, 8)):
        with caplog.at_level(logging.WARNING):
            found = sample(both, positive(subject), negative(), size=size)
        assert close(found, sample(moma(plain, adapter, subject), positive(subject), negative(), size=size), 1e-5)
    assert message("TorchCompileModel") in caplog.text
