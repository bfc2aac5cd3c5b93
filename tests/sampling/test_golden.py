"""The released code's recorded runs, through the pack's patches and ComfyUI's sampling."""

import golden
import pytest

from workbench import ROOT

DATA = ROOT / "tests" / "data"


@pytest.mark.parametrize("name", ["tiny_context", pytest.param("tiny_texture", marks=pytest.mark.slow)])
def test_every_step_follows_the_released_code(name: str) -> None:
    case, trace, recorder = golden.run_case(DATA / "golden", name)
    worst = golden.errors(case, trace, recorder)
    assert len(recorder.eps) == len(case["timesteps"])
    assert worst["eps"] <= golden.TOLERANCE and worst["mask"] <= golden.TOLERANCE
    # The check can fail: steps in the wrong order are far outside the tolerance.
    recorder.eps.reverse()
    recorder.masks.reverse()
    swapped = golden.errors(case, trace, recorder)
    assert swapped["eps"] > 100 * golden.TOLERANCE and swapped["mask"] > 100 * golden.TOLERANCE
