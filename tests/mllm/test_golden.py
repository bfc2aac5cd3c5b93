"""The original LLaVA's recorded values, through the pack's language model."""

import mllm_golden

from workbench import ROOT

DATA = ROOT / "tests" / "data"


def test_the_mllm_follows_the_original_llava() -> None:
    worst = mllm_golden.compare(DATA / "mllm" / "tiny56")
    assert not mllm_golden.failed(worst), worst
    assert mllm_golden.failed({**worst, "ids": False})
    assert mllm_golden.failed({**worst, "last_hidden": float("nan")})
