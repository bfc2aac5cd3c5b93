"""What all stages share: a training loop that goes on where it was killed, with averaged weights and its log."""

import csv
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_SECONDS = 300


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains.

    Attributes:
        samples: How many it sees in all.
        batch: How many a step sees.
        rate: AdamW's learning rate: rises over `warm_up` steps, stays, and falls to 0 over the last `cooling` share.
        ema: Decay of the averaged weights per step; it rises to this from 0.
        muon: Learning rate of Muon (arXiv 2502.16982), which then updates the matrices of layers in place of AdamW;
            it rises and falls as `rate` does.
        parts: A batch is computed in so many parts, one after another: less memory, the same step.
    """

    samples: int
    batch: int
    rate: float
    warm_up: int = 200
    cooling: float = 0.25
    ema: float = 0.999
    weight_decay: float = 0.01
    muon: float | None = None
    parts: int = 1

    def shortened(self, share: float) -> "Plan":
        """The same plan with a share of its samples."""
        return replace(self, samples=int(self.samples * share))

    def rate_at(self, seen: int) -> float:
        """The learning rate after so many samples."""
        rising = min(1.0, (seen / self.batch + 1) / self.warm_up)
        falling = min(1.0, max(0.0, (1 - seen / self.samples) / self.cooling))
        return self.rate * rising * falling


@dataclass(frozen=True)
class Start:
    """What a stage goes on from where it has no state of its own, such as published weights.

    Attributes:
        weights: The module's, by name; those that are missing stay as they are drawn.
        seen: Samples that were seen for them.
    """

    weights: dict[str, Tensor]
    seen: int


class Averaged:
    """Exponential moving average of a module's parameters, on the parameters' own device."""

    def __init__(self, module: nn.Module) -> None:
        """Start from the weights as they are."""
        self.weights = {name: value.detach().clone().float() for name, value in module.named_parameters()}

    def update(self, module: nn.Module, decay: float) -> None:
        """Move towards the module's weights by `1 - decay`."""
        pairs = [(self.weights[name], value.detach().float()) for name, value in module.named_parameters()]
        torch._foreach_lerp_([mean for mean, _ in pairs], [value for _, value in pairs], 1 - decay)


class Training:
    """One stage: a module, its optimizer, its average and how far it is, kept in a file.

    Attributes:
        seen: Samples so far.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        folder: Path,
        device: torch.device,
        faster: Mapping[str, float] | None = None,
        accelerator: Any = None,
        start: Start | None = None,
    ) -> None:
        """Go on from the folder's state, if there is one.

        Args:
            module: What of it requires gradients is trained.
            faster: Names of parameters whose rate is the plan's times a factor, and which do not decay.
            accelerator: accelerate's, which then scales losses and gradients.
            start: What to go on from where the folder has no state.
        """
        self.module = module.to(device)
        self.plan = plan
        self.device = device
        self.seen = 0 if start is None else start.seen
        if start is not None:
            module.load_state_dict(start.weights, strict=False)
        self._folder = folder
        self._file = folder / "state.pt"
        folder.mkdir(parents=True, exist_ok=True)
        faster = faster or {}
        trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        self._muon = None if plan.muon is None else _Muon(module, plan.muon / plan.rate, plan.weight_decay)
        if self._muon is not None:
            trained = [(name, value) for name, value in trained if name not in self._muon.names]
        decayed = [value for name, value in trained if name not in faster and value.dim() > 1]
        others = [value for name, value in trained if name not in faster and value.dim() <= 1]
        own = [(factor, value) for name, factor in faster.items() for found, value in trained if found == name]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": plan.weight_decay}]
        groups += [{"params": part, "weight_decay": 0.0} for part in (others, *([value] for _, value in own))]
        self._factors = [1.0, 1.0, *(factor for factor, _ in own)]
        self._optimizer: Any = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.99), fused=True)
        self._accelerator = accelerator
        if accelerator is not None:
            self._optimizer = accelerator.prepare_optimizer(self._optimizer)
        self._average = Averaged(self.module)
        if self._file.is_file():
            self._load()

    @property
    def done(self) -> bool:
        """Whether the plan is fulfilled."""
        return self.seen >= self.plan.samples

    def run(self, loss_of: Callable[[int], Tensor], show: Callable[[], None]) -> None:
        """Train to the plan's end.

        Args:
            loss_of: The loss of one batch (of a part of it, see `Plan.parts`), given how many samples were seen
                before it.
            show: Called after each save: writes sample sheets.
        """
        saved = shown = time.monotonic()
        total = torch.zeros((), device=self.device)
        steps = 0
        while not self.done:
            for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
                group["lr"] = factor * self.plan.rate_at(self.seen)
            if self._muon is not None:
                self._muon.set_rate(self.plan.rate_at(self.seen))
            torch.manual_seed(self.seen)  # Noise and drops do not depend on where a run was killed.
            loss = torch.zeros((), device=self.device)
            for part in range(self.plan.parts):
                of_part = loss_of(self.seen + part * self.plan.batch // self.plan.parts) / self.plan.parts
                self._backward(of_part)
                loss += of_part.detach()
            self._clip()
            self._optimizer.step()
            if self._muon is not None:
                self._muon.step()
            self.module.zero_grad(set_to_none=True)
            self.seen += self.plan.batch
            step = self.seen // self.plan.batch
            self._average.update(self.module, min(self.plan.ema, (1 + step) / (10 + step)))
            total += loss
            steps += 1
            now = time.monotonic()
            if now - shown > 30 or self.done:
                self._log(float(total) / steps, steps * self.plan.batch / (now - shown))
                total.zero_()
                steps, shown = 0, now
            if now - saved > SAVE_SECONDS or self.done:
                self.save()
                show()
                saved = time.monotonic()

    def averaged(self) -> dict[str, Tensor]:
        """The module's state with averaged parameters."""
        state = {name: value.detach() for name, value in self.module.state_dict().items()}
        return {**state, **self._average.weights}

    def freeze(self, beginnings: tuple[str, ...]) -> None:
        """Set the parameters whose names begin so to their averages; they must get no gradients from now on."""
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                if name.startswith(beginnings):
                    value.copy_(self._average.weights[name])

    def averaged_module(self) -> Any:
        """The module with averaged parameters, frozen; it is not trained on."""
        self.module.load_state_dict(self.averaged())
        return self.module.eval().requires_grad_(False)

    def _backward(self, loss: Tensor) -> None:
        if self._accelerator is None:
            loss.backward()
        else:
            self._accelerator.backward(loss)

    def _clip(self) -> None:
        clip = nn.utils.clip_grad_norm_ if self._accelerator is None else self._accelerator.clip_grad_norm_
        clip(self.module.parameters(), 1.0)

    def save(self) -> None:
        """Keep everything that is needed to go on, whole or not at all."""
        state = {
            "seen": self.seen,
            "module": self.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average.weights,
            "muon": None if self._muon is None else self._muon.optimizer.state_dict(),
        }
        write_whole(self._file, lambda path: torch.save(state, path))

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self._file, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._muon is not None:
            self._muon.optimizer.load_state_dict(state["muon"])
        self._average.weights = {name: value.to(self.device) for name, value in state["average"].items()}
        self.seen = state["seen"]

    def _log(self, loss: float, speed: float) -> None:
        print(
            f"{self._folder.name}: {self.seen:,} of {self.plan.samples:,}, loss {loss:.4f}, {speed:.1f}/s", flush=True
        )
        with (self._folder / "loss.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([self.seen, f"{loss:.5f}", f"{speed:.2f}"])


class _Muon:
    """PyTorch's Muon for the weights of linear layers and convolutions, which it is shown as matrices."""

    def __init__(self, module: nn.Module, factor: float, weight_decay: float) -> None:
        layers = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        weights = [(f"{name}.weight", part.weight) for name, part in layers if part.weight.requires_grad]
        self.names = {name for name, _ in weights}
        self._factor = factor
        self._weights = [weight for _, weight in weights]
        self._matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in self._weights]
        rate: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
        self.optimizer = torch.optim.Muon(self._matrices, weight_decay=weight_decay, **rate)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._factor * rate

    def step(self) -> None:
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.view_as(matrix)
        self.optimizer.step()
        for matrix in self._matrices:
            matrix.grad = None


def samples_seen(folder: Path, start: Start | None) -> int:
    """How many samples the stage of this folder has seen."""
    file = folder / "state.pt"
    if file.is_file():
        return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["seen"])
    return 0 if start is None else start.seen


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is there whole or not at all; what a kill leaves of it, the next write takes the place of."""
    partial = path.with_name(path.name + ".part")
    write(partial)
    os.replace(partial, path)
