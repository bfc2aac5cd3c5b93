"""How much is measured: sizes and repeats."""

from dataclasses import dataclass, replace

Size = tuple[int, int]
"""Height and width of a latent; a picture has 8 times as many pixels each way."""


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of every part.

    Attributes:
        tiny: The tests' tiny UNet in place of SD1.5's sizes: shows that the parts run, and nothing else.
        warm_up: Rounds that do not count.
        scaling_rounds: Of the smaller pictures; larger ones get one.
        scaling_batch: Latent of the runs with several pictures per batch.
        scaling_scene: Latent of the runs with other masks, references and subjects.
        shares: Parts of the new picture, 0..1, that the subject is kept to; each part of MoMA alone at the first.
        share_runs: Latents and batches of these.
        compile_backend: What compiles; the tests take one that needs no compiler.
        mllm_full: Whether the full-size language model is measured (on a CPU: two of its layers).
    """

    tiny: bool
    warm_up: int
    step_size: Size
    step_rounds: int
    run_size: Size
    run_steps: int
    run_rounds: int
    scaling_sizes: tuple[Size, ...]
    scaling_batch: Size
    scaling_batches: tuple[int, ...]
    scaling_scene: Size
    scaling_masks: tuple[float, ...]
    scaling_references: tuple[int, ...]
    scaling_subjects: tuple[int, ...]
    scaling_rounds: int
    shares: tuple[float, ...]
    share_runs: tuple[tuple[Size, int], ...]
    share_rounds: int
    compile_size: Size
    compile_rounds: int
    compile_backend: str
    mllm_rounds: int
    mllm_full: bool
    memory_size: Size
    memory_cases: tuple[str, ...]
    leak_runs: int


FULL = Plan(
    tiny=False,
    warm_up=0,
    step_size=(64, 64),
    step_rounds=5,
    run_size=(32, 32),
    run_steps=30,
    run_rounds=1,
    scaling_sizes=((32, 32), (48, 48), (64, 64), (36, 64), (96, 96), (128, 128)),
    scaling_batch=(32, 32),
    scaling_batches=(1, 2, 4),
    scaling_scene=(64, 64),
    scaling_masks=(0.05, 0.5, 1.0),
    scaling_references=(2, 3, 4),
    scaling_subjects=(2, 3),
    scaling_rounds=2,
    shares=(0.25, 0.1, 0.5),
    share_runs=(((64, 64), 1), ((64, 64), 4), ((96, 96), 1)),
    share_rounds=3,
    compile_size=(64, 64),
    compile_rounds=3,
    compile_backend="inductor",
    mllm_rounds=3,
    mllm_full=True,
    memory_size=(64, 64),
    memory_cases=("plain", "apply", "shortcut", "both"),
    leak_runs=200,
)
QUICK = replace(
    FULL,
    step_size=(32, 32),
    step_rounds=2,
    run_size=(24, 24),
    run_steps=4,
    scaling_sizes=((16, 16), (24, 32)),
    scaling_batch=(16, 16),
    scaling_batches=(2,),
    scaling_scene=(24, 24),
    scaling_masks=(1.0,),
    scaling_references=(2,),
    scaling_subjects=(2,),
    scaling_rounds=1,
    shares=(0.25,),
    share_runs=(((24, 24), 1),),
    share_rounds=1,
    compile_size=(24, 24),
    compile_rounds=1,
    mllm_rounds=1,
    mllm_full=False,
    memory_size=(32, 32),
    memory_cases=("plain", "both"),
    leak_runs=40,
)
TINY = replace(
    QUICK,
    tiny=True,
    step_size=(8, 8),
    run_size=(8, 8),
    run_steps=2,
    scaling_sizes=((8, 8), (8, 16)),
    scaling_batch=(8, 8),
    scaling_scene=(8, 8),
    share_runs=(((8, 8), 1), ((8, 8), 2)),
    compile_size=(8, 8),
    compile_backend="eager",
    memory_size=(8, 8),
    leak_runs=4,
)
PLANS = {"full": FULL, "quick": QUICK, "tiny": TINY}


def plan_for(name: str, cuda: bool) -> Plan:
    """The plan of this name; a GPU gets the repeats that its speed allows and its short times need."""
    plan = PLANS[name]
    if not cuda or plan.tiny:
        return plan
    more = 5 if name == "quick" else 10
    return replace(
        plan,
        warm_up=3,
        step_size=(64, 64),
        step_rounds=plan.step_rounds * more,
        run_size=(64, 64),
        run_steps=30,
        run_rounds=5,
        scaling_rounds=plan.scaling_rounds * more,
        share_rounds=plan.share_rounds * more,
        compile_size=(64, 64),
        compile_rounds=plan.compile_rounds * more,
        memory_size=(64, 64),
    )
