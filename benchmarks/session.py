"""What the parts of the benchmark share within one process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from plan import Plan
from workload import Workload, load_workload


@dataclass(frozen=True)
class Session:
    """The plan, and the model that is loaded when a part first asks for it."""

    plan: Plan
    moma_repo: Path | None

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in: fp16 on a GPU, as ComfyUI chooses for SD1.5, else fp32."""
        return torch.float16 if torch.cuda.is_available() else torch.float32

    @cached_property
    def workload(self) -> Workload:
        """The model and the adapter."""
        return load_workload(self.plan.tiny, self.dtype)
