"""The emulated cards themselves: they refuse what a card refuses, notice what the host waits for, and leave nothing."""

from collections.abc import Callable

import comfy.model_management
import pytest
import torch

from workbench.emulated_card import SECOND, OnCard, emulated_cards
from workbench.fake_device import CARD

WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: range(int(x[0])),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "a list": lambda x: x.tolist(),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: x + torch.ones(4).to(x.device),
    "a new tensor": lambda x: torch.tensor([1.0], device=x.device),
    "numbers in a list": lambda x: torch.tensor([x[0], x[1]]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "a mask as index": lambda x: x[x > 1],
    "places on the CPU": lambda x: x[torch.tensor([1])],
    "writing through a mask": lambda x: x.index_put_((x > 1,), torch.arange(2.0, device=x.device)),
    "equal": lambda x: torch.equal(x, x),
    "masked_select": lambda x: torch.masked_select(x, x > 1),
    "unique": lambda x: x.unique(),
    "copying in": lambda x: x.copy_(torch.ones(4)),
    "copying out": lambda x: torch.ones(4).copy_(x),
    "another card": lambda x: x.to(SECOND),
    "isfinite": lambda x: bool(x.isfinite().all()),
}

NO_WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0) @ x,
    "making": lambda x: torch.ones(3, device=x.device) + torch.arange(3, device=x.device),
    "a number on the CPU": lambda x: x * torch.tensor(2.0),
    "shape": lambda x: x.view(2, 2).T.shape[0] + x.numel() + x.stride()[0],
    "places": lambda x: x[torch.arange(2, device=x.device)],
    "one value through a mask": lambda x: x.masked_fill_(x > 1, 0.0),
    "without waiting": lambda x: x.copy_(torch.ones(4), non_blocking=True),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 1, 2, 2)] * 3),
}

REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "the CPU": lambda x: x + torch.ones(4),
    "the other card": lambda x: x * x.to(SECOND),
    "a number on the other card": lambda x: x * torch.tensor(1.0).to(SECOND),
    "places on the other card": lambda x: x[torch.tensor([1]).to(SECOND)],
    "a number on the card": lambda x: torch.ones(4) + x[0],
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x.view(1, 1, 2, 2), x.view(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    ),
    "a layer": lambda x: torch.nn.Linear(4, 4)(x),
    "writing": lambda x: torch.ones(4).add_(x),
    "out": lambda x: torch.add(x, x, out=torch.empty(4)),
}


def sample_values() -> torch.Tensor:
    return torch.arange(4.0).to(CARD)


@pytest.mark.parametrize("case", WAITS)
def test_a_wait_is_noticed(case: str) -> None:
    with emulated_cards() as record, torch.inference_mode():
        x = sample_values()
        record.waits.clear()
        WAITS[case](x)
    assert sum(record.waits.values()) >= 1
    assert all("test_emulated_card.py" in wait.site and not wait.in_step for wait in record.waits)


@pytest.mark.parametrize("case", NO_WAITS)
def test_what_the_card_does_alone_is_no_wait(case: str) -> None:
    with emulated_cards() as record, torch.inference_mode():
        x = sample_values()
        record.waits.clear()
        NO_WAITS[case](x)
    assert not record.waits


@pytest.mark.parametrize("case", REFUSED)
def test_operands_on_two_devices_are_refused(case: str) -> None:
    with (
        emulated_cards(),
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"),
    ):
        REFUSED[case](sample_values())


def test_values_are_those_of_the_cpu() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Flatten(2))
    x = torch.randn(1, 2, 5, 5)
    expected = layer(x)
    with emulated_cards(), torch.no_grad():
        there = layer.to(SECOND)(x.to(SECOND))
        assert isinstance(there, OnCard) and there.device == SECOND and there.shape == expected.shape
        half = there[:, :2]
        half.zero_()  # a view is a view there as well
        back = there.cpu()
        layer.cpu()
    assert type(back) is torch.Tensor and not back[:, :2].any()
    assert torch.equal(back[:, 2:], expected[:, 2:])
    assert {type(parameter) for parameter in layer.parameters()} == {torch.nn.Parameter}
    assert torch.equal(layer(x), expected)


def test_attention_on_two_dtypes_is_refused() -> None:
    with emulated_cards(), torch.inference_mode():
        x = torch.ones(1, 1, 2, 2, device=CARD)
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.nn.functional.scaled_dot_product_attention(x, x, x.half())


def test_numpy_takes_nothing_from_a_card() -> None:
    with emulated_cards(), pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        sample_values().numpy()


def test_nothing_stays_behind() -> None:
    before = (torch.Generator, torch.cuda.synchronize, torch.cuda.mem_get_info, torch.cuda._lazy_init)
    with emulated_cards():
        x = sample_values()
        assert comfy.model_management.get_free_memory(CARD) > 1 << 30
        assert torch.Generator(CARD).device.type == "cpu"
    assert before == (torch.Generator, torch.cuda.synchronize, torch.cuda.mem_get_info, torch.cuda._lazy_init)
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert not torch._C._only_lift_cpu_tensors()
    with pytest.raises(RuntimeError, match="the emulation has ended"):
        x + 1
