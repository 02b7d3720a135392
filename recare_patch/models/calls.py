"""What a pipeline gives its denoiser, learnt from its own calls: text, state, time, and all the rest.

Nothing here knows a family. A pipeline is run with its own ``__call__``; what it gives its denoiser and its scheduler
is kept. Arguments that differ between two prompts at one seed are the text's, those that differ between two steps
of one prompt the state's, and those that grow with a second prompt carry the batch. Another state under another
prompt is then the same call with these arguments exchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError

Path = tuple[str | int, ...]
"""Where an argument stands: its name, then keys and places in what it holds."""

ROWS = "rows"
"""The axis of an argument that is a list with an item for each row."""


class Enough(Exception):
    """Ends a pipeline's call once the denoiser has been called as often as is needed."""


@dataclass
class Record:
    """What one run of a pipeline gave its denoiser and its scheduler."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    steps: list[tuple[Tensor, Any, Tensor]] = field(default_factory=list)  # model_output, timestep, sample
    last: Tensor | None = None  # what the last step returned


class Stepped(tuple[Any, ...]):
    """What a scheduler's step or a denoiser returns, by place or by name."""

    @property
    def prev_sample(self) -> Any:
        """The sample."""
        return self[0]

    sample = prev_sample


def first_of(output: Any) -> Any:
    """The prediction in what a denoiser or a step returned: a tensor, or a list with one for each row."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded(denoiser: nn.Module, scheduler: Any, *, most: int | None = None) -> Iterator[Record]:
    """Inside, calls of a denoiser and steps of its scheduler are kept; the call after ``most`` ends the run."""
    found, own, parameters = Record(), scheduler.step, inspect.signature(denoiser.forward)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if most is None or len(found.calls) <= most:
            found.calls.append(dict(parameters.bind(*args, **kwargs).arguments))
        if most is not None and len(found.calls) > most:
            raise Enough

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.outputs.append(first_of(output))

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        # What is noted is noted before: schedulers may work in place.
        found.steps.append((model_output.clone(), timestep, sample.clone()))
        made = own(model_output, timestep, sample, *args, **kwargs)
        found.last = first_of(made) if isinstance(made, tuple) else made.prev_sample
        return made

    hooks = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(after),
    ]
    scheduler.step = step
    try:
        yield found
    except Enough:
        pass
    finally:
        del scheduler.step
        for hook in hooks:
            hook.remove()


def same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def leaves(one: Any, two: Any, at: Path = ()) -> dict[Path, int | str | None]:
    """The arguments of a call with one row and of the same call with two: place → the axis that carries the batch."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        pairs = [(key, one[key], two[key]) for key in one if key in two]
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and one:
        if len(two) == 2 * len(one):
            return {at: ROWS}
        pairs = [(k, a, b) for k, (a, b) in enumerate(zip(one, two, strict=False))]
    else:
        axis = None
        if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
            axis = next((k for k in range(one.ndim) if two.shape[k] == 2 * one.shape[k]), None)
        return {at: axis}
    found: dict[Path, int | str | None] = {}
    for key, a, b in pairs:
        found |= leaves(a, b, (*at, key))
    return found


def value_at(call: Any, path: Path) -> Any:
    """The argument at a place; None where a call has none there."""
    for key in path:
        try:
            call = call[key]
        except (KeyError, IndexError, TypeError):
            return None
    return call


def with_values(call: Any, values: Mapping[Path, Any], at: Path = ()) -> Any:
    """A call with other arguments at some places; what it holds is not changed."""
    if at in values:
        return values[at]
    if isinstance(call, Mapping):
        keys = [*call, *(path[len(at)] for path in values if path[: len(at)] == at and path[len(at)] not in call)]
        return {key: with_values(call.get(key), values, (*at, key)) for key in dict.fromkeys(keys)}
    if isinstance(call, list | tuple):
        return type(call)([with_values(one, values, (*at, k)) for k, one in enumerate(call)])
    return call


def rows_of(value: Any, axis: int | str | None, count: int) -> list[Any]:
    """An argument of ``count`` rows in parts of one row each."""
    if axis == ROWS and isinstance(value, list | tuple):
        each = len(value) // count
        return [value[k * each : (k + 1) * each] for k in range(count)]
    if isinstance(axis, int) and isinstance(value, Tensor):
        return list(value.chunk(count, axis))
    return [value] * count


def joined(values: Sequence[Any], axis: int | str | None) -> Any:
    """The rows of an argument in one."""
    first = values[0]
    if axis == ROWS and isinstance(first, list | tuple):
        return type(first)([one for value in values for one in value])
    if isinstance(axis, int) and isinstance(first, Tensor):
        return torch.cat(list(values), axis)
    return first


def likeness(value: Any, shared: bool = False) -> Any:
    """The shapes of tensors and the values of all else; of what a whole batch shares, the values of tensors too."""
    if isinstance(value, Tensor):
        return tuple(value.shape), tuple(value.flatten().tolist()) if shared else ()
    if isinstance(value, list | tuple):
        return tuple(likeness(one, shared) for one in value)
    return repr(value)


def one_row(trail: Record) -> bool:
    """Whether a denoiser predicted one row for each sample of its scheduler: there was no guidance."""
    return all(len(stacked(one)) == len(step[2]) for one, step in zip(trail.outputs, trail.steps, strict=False))


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two prompts' calls have the same shapes: the pipeline pads to one length."""

    def shapes(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shapes(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shapes(inner) for inner in value]
        return tuple(value.shape) if isinstance(value, Tensor) else type(value)

    return bool(shapes(one) == shapes(other))


Fill = Callable[[Tensor], Any]
"""From states ``[rows, …]`` to the argument that holds them."""


@dataclass(frozen=True)
class Form:
    """How a denoiser is called: a call of one row, and what each of its arguments is.

    Attributes:
        frame: the call.
        axes: place → the axis that carries the batch.
        text: places of what the prompt says; the first is the longest, what a text encoder made of its tokens.
        state: place → how states become its argument.
        times: place → ``a, b`` of ``a + b t`` for the scheduler's timestep ``t``.
        output: from what the denoiser returned to predictions of the states' shape.
    """

    frame: Mapping[str, Any]
    axes: Mapping[Path, int | str | None]
    text: tuple[Path, ...]
    state: Mapping[Path, Fill]
    times: Mapping[Path, tuple[float, float]]
    output: Callable[[Any], Tensor]

    @property
    def one_time(self) -> bool:
        """Whether all rows of a call must be at one timestep."""
        return any(self.axes.get(path) is None for path in self.times)

    def axis(self, path: Path) -> int | str | None:
        """The axis of a place; of one that only some calls have, the first."""
        return self.axes.get(path, 0)

    def kind(self, told: Mapping[Path, Any]) -> Any:
        """What rows must have in common to go into one call."""
        return tuple(likeness(value, self.axis(path) is None) for path, value in told.items())

    def texts(self, call: Mapping[str, Any], count: int) -> list[dict[Path, Any]]:
        """What a call of ``count`` rows says, by row."""
        split = {path: rows_of(value_at(call, path), self.axis(path), count) for path in self.text}
        return [{path: rows[k] for path, rows in split.items()} for k in range(count)]

    def call(self, states: Tensor, timesteps: Tensor, texts: Sequence[Mapping[Path, Any]]) -> dict[str, Any]:
        """The arguments for states ``[rows, …]`` at timesteps ``[rows]`` under texts that are alike."""
        count = len(states)
        kept = {path: axis for path, axis in self.axes.items() if path not in self.times}
        values = {path: joined([value_at(self.frame, path)] * count, axis) for path, axis in kept.items()}
        values |= {path: joined([one[path] for one in texts], self.axis(path)) for path in self.text}
        values |= {path: fill(states) for path, fill in self.state.items()}
        for path, (start, slope) in self.times.items():
            like = value_at(self.frame, path)
            at = start + slope * (timesteps if self.axes.get(path) is not None else timesteps[:1]).cpu().double()
            if isinstance(like, Tensor):
                # One without a batch axis may have been given one.
                shape = (len(at), *like.shape[1:]) if like.ndim or self.axes.get(path) is not None else ()
                values[path] = at.to(like.device, like.dtype).reshape(shape)
            else:
                values[path] = float(at[0])
        made: dict[str, Any] = with_values(self.frame, values)
        return made


def states_of(form: Form, trail: Record, number: int) -> Tensor:
    """The state of a call, as :meth:`Form.call` takes it: what the scheduler holds, or what it was scaled to."""
    sample = trail.steps[number][2]
    value = value_at(trail.calls[number], next(iter(form.state)))
    scaled = isinstance(value, Tensor) and value.numel() == sample.numel()
    return value.reshape(sample.shape).to(sample.dtype) if scaled else sample


def learn(name: str, trail: Record, other: Mapping[str, Any], two: Mapping[str, Any], *, scaled: bool) -> Form:
    """Learn how a denoiser is called.

    Args:
        name: of the base, for messages.
        trail: three calls of one prompt's run, with their outputs and steps.
        other: the first call under another prompt.
        two: the first call of two rows with the first prompt.
        scaled: whether a state may be the scheduler's sample times a number: its noise schedule is discrete.

    Raises:
        BaseModelError: an argument changes with the steps in a way that is none of these, or mixes text and state.
    """
    if len(trail.steps) < 3 or len(trail.outputs) != len(trail.steps):
        counted = f"{len(trail.outputs)} times in {len(trail.steps)} steps"
        raise BaseModelError(
            f"base {name} calls its denoiser {counted} of its scheduler, and one call a step is needed"
        )
    frame, later = trail.calls[0], trail.calls[1]
    axes = leaves(frame, two)
    there = [*axes, *(path for path in leaves(other, other) if path not in axes and _is_text_only(other, frame, path))]
    text = [path for path in there if not same(value_at(frame, path), value_at(other, path))]
    moves = [path for path in axes if not same(value_at(frame, path), value_at(later, path))]
    if both := [path for path in text if path in moves]:
        raise BaseModelError(f"base {name} gives its denoiser text and picture in one argument, '{both[0][0]}'")
    if not text:
        raise BaseModelError(f"base {name} is no text-to-image model: its denoiser is told nothing of the prompt")
    state: dict[Path, Fill] = {}
    times: dict[Path, tuple[float, float]] = {}
    samples, stamps = [one[2] for one in trail.steps], [float(one[1]) for one in trail.steps]
    for path in moves:
        values = [value_at(call, path) for call in trail.calls[: len(stamps)]]
        if (line := _line(values, stamps)) is not None:
            times[path] = line
        elif (fill := _fill(values, samples, scaled)) is not None:
            state[path] = fill
        else:
            raise BaseModelError(
                f"base {name} changes the argument '{path[0]}' of its denoiser from step to step in a way that is not "
                "known: it is neither the picture's state nor a timestep"
            )
    if not state:
        raise BaseModelError(f"base {name} gives its denoiser no state of the picture")
    text.sort(key=lambda path: -_numel(value_at(frame, path)))
    output = _output(name, trail)
    return Form(frame, axes, tuple(text), state, times, output)


def _is_text_only(other: Any, frame: Any, path: Path) -> bool:
    return value_at(other, path) is not None and value_at(frame, path) is None


def _numel(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() if value.is_floating_point() else 0
    return sum(map(_numel, value)) if isinstance(value, list | tuple) else 0


def _line(values: Sequence[Any], stamps: Sequence[float]) -> tuple[float, float] | None:
    """``a, b`` of an argument that is ``a + b t``; None where it is none."""
    if any((value.numel() if isinstance(value, Tensor) else 1) != 1 for value in values):
        return None
    if not all(isinstance(value, Tensor | int | float) for value in values):
        return None
    numbers = [float(value) for value in values]
    if stamps[0] == stamps[1]:
        return None
    slope = (numbers[1] - numbers[0]) / (stamps[1] - stamps[0])
    start = numbers[0] - slope * stamps[0]
    # Numbers that people write (1, 1/1000, −1/1000) where it is one up to rounding.
    for neat in (1.0, 1e-3, -1e-3, -1.0):
        if abs(slope / neat - 1) < 1e-3:
            slope, start = neat, numbers[0] - neat * stamps[0]
            start = float(round(start)) if abs(start - round(start)) < 1e-3 else start
    reach = max(map(abs, numbers))
    fits = all(abs(start + slope * t - n) <= 1e-2 * reach for t, n in zip(stamps, numbers, strict=True))
    return (start, slope) if fits else None


def _scale(value: Tensor, of: Tensor) -> float | None:
    """The number that a tensor is another one times, up to the rounding of its dtype."""
    value, of = value.detach().double(), of.detach().double()
    found = float((value * of).sum() / of.square().sum().clamp(min=1e-30))
    left = float((value - found * of).norm() / value.norm().clamp(min=1e-30))
    return found if left < 2e-2 else None


def _fill(values: Sequence[Any], samples: Sequence[Tensor], scaled: bool) -> Fill | None:
    """How the scheduler's samples become an argument; None where they do not."""
    if isinstance(values[0], list | tuple):
        inner = [one for value in values if isinstance(one := _alone(value), Tensor)]
        if len(inner) < len(values) or inner[0].numel() != samples[0].numel():
            return None
        if any(not _holds(one, sample, scaled) for one, sample in zip(inner, samples, strict=False)):
            return None
        return functools.partial(_as_lists, values[0], inner[0])
    if not isinstance(values[0], Tensor) or not values[0].is_floating_point():
        return None
    like = values[0]
    if like.numel() == samples[0].numel():
        if any(not _holds(one, sample, scaled) for one, sample in zip(values, samples, strict=False)):
            return None
        return lambda states: states.to(like.dtype).reshape(-1, *like.shape[1:])
    return _beside(values, samples)


def _alone(value: Any) -> Any:
    """What lists of one item hold in the end."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value


def _as_lists(like: Any, each: Tensor, states: Tensor) -> Any:
    rows = states.to(each.dtype).reshape(-1, *each.shape).unbind(0)
    return type(like)(_with_alone(like, one)[0] for one in rows)


def _with_alone(value: Any, held: Tensor) -> Any:
    return type(value)([_with_alone(value[0], held)]) if isinstance(value, list | tuple) else held


def _beside(values: Sequence[Tensor], samples: Sequence[Tensor]) -> Fill | None:
    """How samples become a part of an argument, beside what does not change."""
    like, sample = values[0], samples[0]
    wider = [k for k in range(1, like.ndim) if like.ndim == sample.ndim and like.shape[k] != sample.shape[k]]
    if len(wider) != 1 or like.shape[wider[0]] < sample.shape[wider[0]]:
        return None
    axis, size = wider[0], sample.shape[wider[0]]
    for start in {like.shape[axis] - size, 0}:
        parts = [one.narrow(axis, start, size) for one in values]
        if all(_holds(one, other, False) for one, other in zip(parts, samples, strict=False)):
            ends = like.narrow(axis, 0, start), like.narrow(axis, start + size, like.shape[axis] - start - size)
            return functools.partial(_between, ends, axis)
    return None


def _between(ends: tuple[Tensor, Tensor], axis: int, states: Tensor) -> Tensor:
    rows = (len(states),) + (1,) * (states.ndim - 1)
    return torch.cat([ends[0].repeat(rows), states.to(ends[0].dtype), ends[1].repeat(rows)], axis)


def _holds(value: Tensor, sample: Tensor, scaled: bool) -> bool:
    found = _scale(value.reshape(sample.shape), sample)
    return found is not None and (scaled or abs(found - 1) < 1e-2)


def _output(name: str, trail: Record) -> Callable[[Any], Tensor]:
    """From what a denoiser returned to what its scheduler is given, for any number of rows."""
    shape, wanted = trail.steps[0][2].shape[1:], [one[0] for one in trail.steps]
    # A learnt variance beside the prediction is the scheduler's business.
    targets = [_narrowed(one, shape, 0) for one in wanted]
    for place in (0, -1):
        pairs = [(_narrowed(stacked(one), shape, place), b) for one, b in zip(trail.outputs, targets, strict=False)]
        found = [_scale(b, a) if a is not None and b is not None else None for a, b in pairs]
        first = found[0]
        if first is not None and all(one is not None and abs(one - first) < 2e-2 * abs(first) for one in found):
            factor = float(round(first)) if abs(abs(first) - 1) < 2e-2 else first
            return functools.partial(_returned, shape, place, factor)
    raise BaseModelError(
        f"base {name} changes what its denoiser returns, before its scheduler sees it, in a way that is not known"
    )


def _returned(shape: Sequence[int], place: int, factor: float, output: Any) -> Tensor:
    taken = _narrowed(stacked(output), shape, place)
    assert taken is not None
    return taken * factor


def stacked(returned: Any) -> Tensor:
    """Rows in one tensor, where they came as a list."""
    return torch.stack(list(returned)) if isinstance(returned, list | tuple) else returned


def _narrowed(tensor: Tensor, shape: Sequence[int], place: int) -> Tensor | None:
    """Rows of a shape out of rows that may be longer along one axis: their beginning, or with ``-1`` their end."""
    rows = len(tensor)
    if tensor[0].numel() == torch.Size(shape).numel():
        return tensor.reshape(rows, *shape)
    if tensor.ndim != len(shape) + 1:
        return None
    wider = [k for k in range(1, tensor.ndim) if tensor.shape[k] != shape[k - 1]]
    if len(wider) != 1 or tensor.shape[wider[0]] < shape[wider[0] - 1]:
        return None
    axis, size = wider[0], shape[wider[0] - 1]
    return tensor.narrow(axis, 0 if place == 0 else tensor.shape[axis] - size, size)
