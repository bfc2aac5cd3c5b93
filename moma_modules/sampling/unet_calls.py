"""Which forwards of the UNet are a run's own: only these get the features and feed the masks.

Other nodes run the UNet in the middle of a run for purposes of their own: over a reference picture, over parts, as a
probe. Such a forward comes with everything of the run but the latent that the sampler asked for. So our wrappers lie
around those of others, where they note that latent, and again below them, where they compare.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .attention import FORWARD
from .rows import take_rows
from .settings import KEY

_AROUND, _BELOW = f"{KEY}_around", f"{KEY}_below"
"""Keys of our wrappers around and below those of others."""

_PENDING = f"{KEY}_pending_forward"
"""Key of a `Forward` in the transformer options until our wrapper below those of others lets the patches see it."""

_PLACE = 4
"""Where the transformer options are among a wrapper's arguments after x."""


@dataclass
class _Request:
    """Rows that the sampler wants evaluated, and what came of it.

    Attributes:
        x: The input, [R, C, h, w].
        passes: Forwards that were taken for the run's own.
        changed: Whether one of them had another input.
        others: Of all other forwards the rows, height and width that were expected, and those that came.
    """

    x: Tensor
    passes: int = 0
    changed: bool = False
    others: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


class UnetCalls:
    """Tells a run's own forwards from those of others."""

    def __init__(self) -> None:
        self.others_on_model = ""
        """Who else is on the model, for messages."""
        self._request: _Request | None = None
        self._input_changes = False
        """Whether another node changes the latent on its way to the UNet, as nodes that add noise do."""

    def evaluate(self, x: Tensor, run: Callable[[], Any]) -> Any:
        """What lies between the sampler's request for the rows `x` [R, C, h, w] and the UNet; twice if need be.

        Raises:
            ValueError: None of its forwards is the run's own, or it cannot be told which one is.
        """
        if self._request is not None:  # the request within which this one is made decides
            return run()
        request, out = self._attempt(x, run)
        if request.passes or not request.others:  # also: a cache answered without the UNet
            return out
        if any(expected == came for expected, came in request.others) and not self._input_changes:
            # Every input was another one: the latent is changed on its way. Once more, with that in mind.
            self._input_changes = True
            request, out = self._attempt(x, run)
            if request.passes:
                return out
            self._input_changes = False
            raise ValueError(
                "MoMA: another node gives the UNet another latent than the sampler's, and did not do so again when it "
                "was asked twice, so MoMA cannot tell which forward of the UNet makes the picture. Remove that node."
                f"{self.others_on_model}"
            )
        (rows, height, width), came = request.others[0]
        raise ValueError(
            f"MoMA: another node changed the model's input to {came[0]} rows of {came[1]}x{came[2]}, where {rows} rows "
            f"of {height}x{width} were expected. Nodes that cut the picture into tiles or windows do that; remove them "
            f"from this model.{self.others_on_model}"
        )

    def _attempt(self, x: Tensor, run: Callable[[], Any]) -> tuple[_Request, Any]:
        self._request = request = _Request(x)
        try:
            out = run()
        finally:
            self._request = None
        if request.changed and request.passes > 1:
            raise ValueError(
                "MoMA: another node changes the latent on its way to the UNet and runs the UNet several times for one "
                "evaluation, so MoMA cannot tell which of them makes the picture. Remove that node."
                f"{self.others_on_model}"
            )
        return request, out

    def requested(self, x: Tensor) -> bool:
        """Whether `x` is what the sampler asked for, or some of its rows."""
        if self._request is None:
            return True
        whole, rows = self._request.x, len(x)
        starts = range(len(whole) - rows + 1) if rows < len(whole) else ()
        return any(_equal(whole[i : i + rows], x) for i in starts) or self.is_own(whole, x)

    def is_own(self, expected: Tensor, x: Tensor) -> bool:
        """Whether a forward over `x` is the one that was to go over `expected`; one of others is noted."""
        if _equal(expected, x):
            return True
        request = self._request
        if request is None:
            return False
        if self._input_changes and _size(expected.shape) == _size(x.shape):
            request.changed = True
            return True
        self.refuse(expected, x)
        return False

    def refuse(self, expected: Tensor, x: Tensor) -> None:
        """Note a forward over `x`, where one of the size of `expected` was to be, as that of others."""
        if self._request is not None:
            self._request.others.append((_size(expected.shape), _size(x.shape)))

    def start_pass(self, forward: Any) -> None:
        """The UNet runs over the run's own rows."""
        forward.start_pass()
        if self._request is not None:
            self._request.passes += 1


class FunctionWrapper:
    """Around another node's `model_function_wrapper`, in its place: notes what the sampler asked for."""

    def __init__(self, previous: Callable[..., Any], calls: UnetCalls) -> None:
        self.previous = previous
        self.calls = calls

    def __call__(self, model: Callable[..., Any], args: dict[str, Any]) -> Any:
        """See ComfyUI's `set_model_unet_function_wrapper`."""
        return self.calls.evaluate(args["input"], lambda: self.previous(model, args))

    def __deepcopy__(self, _: Any) -> "FunctionWrapper":
        """The run is the same one in every copy of its options."""
        return self


def watch(model_options: dict[str, Any], calls: UnetCalls) -> None:
    """Put our wrappers around and below those of others, in model options that are the run's own."""
    previous = model_options.get("model_function_wrapper")
    if previous is not None and not isinstance(previous, FunctionWrapper):
        model_options["model_function_wrapper"] = FunctionWrapper(previous, calls)
    wrappers = model_options["transformer_options"]["wrappers"]
    others = {key: found for key, found in wrappers[WrappersMP.APPLY_MODEL].items() if key not in (KEY, _BELOW)}
    wrappers[WrappersMP.APPLY_MODEL] = {KEY: [apply_model], **others}
    if any(others.values()):
        wrappers[WrappersMP.APPLY_MODEL][_BELOW] = [_below_apply_model]


def apply_model(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any,
    c_crossattn: Any,
    control: Any,
    transformer_options: Any,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL, around all others: some rows are to go through the UNet."""
    rows = take_rows(kwargs)
    state = transformer_options.get(KEY)
    if state is not None:
        state.guard.check_prepared()
        rows = state.unknown_rows(x) if rows is None else state.guard.fitting(rows, c_crossattn)
    if rows is None or state is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    calls: UnetCalls = state.guard.calls

    def evaluate() -> Any:
        if _size(rows.pixels.shape) != _size(x.shape):
            calls.refuse(rows.pixels, x)
        elif calls.requested(x):
            return run(executor) if state.compilation is None else state.compilation.run(run, executor)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def run(model: Callable[..., Any]) -> Any:
        forward = state.forward(rows, x, transformer_options.get("sigmas"))
        options = _watched({**transformer_options, _PENDING: forward})
        if not any(_is_watched(options, kind) for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)):
            options[FORWARD] = forward
            calls.start_pass(forward)
        out = model(x, t, c_concat, c_crossattn, control, options, **kwargs)
        state.finish_forward(forward)
        return out

    return calls.evaluate(x, evaluate)


def _below_apply_model(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL, below all others."""
    options = _options(args, kwargs)
    forward = options.get(_PENDING)
    if forward is None:
        return executor(x, *args, **kwargs)
    deepest = not _is_watched(options, WrappersMP.DIFFUSION_MODEL)
    return _below(forward, forward.x, deepest, executor, x, args, kwargs)


def _around_unet(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL, around all others."""
    forward = _options(args, kwargs).get(_PENDING)
    if forward is not None:
        forward.unet_input = x
    return executor(x, *args, **kwargs)


def _below_unet(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL, below all others."""
    forward = _options(args, kwargs).get(_PENDING)
    if forward is None:
        return executor(x, *args, **kwargs)
    return _below(forward, forward.unet_input, True, executor, x, args, kwargs)


def _below(
    forward: Any, expected: Tensor, deepest: bool, executor: Any, x: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """What others made of `expected` goes on to the UNet: with the features if it is the run's own."""
    options = _options(args, kwargs)
    calls: UnetCalls = options[KEY].guard.calls
    if not calls.is_own(expected, x):
        args, kwargs = _with_options({**options, _PENDING: None}, args, kwargs)
        return executor(x, *args, **kwargs)
    if not deepest:
        return executor(x, *args, **kwargs)
    calls.start_pass(forward)
    # In place: other nodes keep an eye on these very options while the UNet runs.
    options[FORWARD] = forward
    try:
        return executor(x, *args, **kwargs)
    finally:
        options[FORWARD] = None


def _watched(options: dict[str, Any]) -> dict[str, Any]:
    """The options of one forward, with our wrappers around and below those that others have at the UNet."""
    wrappers = options.get("wrappers", {})
    others = wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
    if not any(others.values()):
        return options
    around = {_AROUND: [_around_unet], **others, _BELOW: [_below_unet]}
    return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: around}}


def _is_watched(options: dict[str, Any], kind: str) -> bool:
    """Whether there are others at this kind of wrapper, and ours below them."""
    return _BELOW in options.get("wrappers", {}).get(kind, {})


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The transformer options among the arguments after x; at the same place for both kinds of wrappers."""
    options: dict[str, Any] = args[_PLACE] if len(args) > _PLACE else kwargs["transformer_options"]
    return options


def _with_options(
    options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > _PLACE:
        return (*args[:_PLACE], options, *args[_PLACE + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": options}


def _size(shape: Any) -> tuple[int, ...]:
    """Rows, height and width; other nodes may add channels."""
    return (shape[0], *shape[2:])


def _equal(expected: Tensor, x: Tensor) -> bool:
    # One look at the values, for which the host waits, only where another node hands on another tensor.
    if x is expected:
        return True
    if _size(x.shape) != _size(expected.shape) or x.shape[1] < expected.shape[1]:
        return False
    return torch.equal(x[:, : expected.shape[1]], expected.to(x.dtype))
