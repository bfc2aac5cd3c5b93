"""The parts of the benchmark by name: modules with `measure(session, case)` and `result(measured)`."""

from types import ModuleType

import compile_part
import leak_part
import memory_part
import mllm_part
import run_part
import scaling_part
import share_part
import step_part

PARTS: dict[str, ModuleType] = {
    "step": step_part,
    "run": run_part,
    "scaling": scaling_part,
    "share": share_part,
    "compile": compile_part,
    "mllm": mllm_part,
    "memory": memory_part,
    "leak": leak_part,
}
SHARED = ("step", "run", "scaling", "share")
"""Parts with one case, which share a process and its model."""
