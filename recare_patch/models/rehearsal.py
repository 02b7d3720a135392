"""A pipeline's own call without weights: what it gives each network, as tensors that have shapes and no values.

The pipeline computes on the CPU. Each of its networks lies on torch's meta device: what it is given goes there, and
comes back as zeros of the shapes that it returned. So a pipeline of any size runs in seconds, its own code untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from recare_patch.core import BaseModelError
from recare_patch.models import lora
from recare_patch.models.calls import first_of, stacked

if TYPE_CHECKING:
    from recare_patch.models.captured import Captured
    from recare_patch.models.layout import Layout

META, HOST = torch.device("meta"), torch.device("cpu")

TOKENS = 128
"""Of a prompt with its template, where a pipeline does not pad it further."""


class _Copies(TorchFunctionMode):
    """What a pipeline itself takes from a network, such as a batch norm's mean, comes to the CPU as zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if func not in (Tensor.to, Tensor.cpu) or not args[0].is_meta:
                raise
            return func(torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, transformers asks no tensor for its values when it makes attention's masks, as where it is traced."""
    from transformers import masking_utils

    own = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_: True  # type: ignore[assignment]
    try:
        yield
    finally:
        masking_utils.is_tracing = own


class Tokens:
    """In a tokenizer's place: prompts of :data:`TOKENS` tokens, padded as a pipeline asks."""

    model_max_length = 512
    padding_side = "right"
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012 - of no textual inversion

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, text: Any = "", *args: Any, max_length: int | None = None, padding: Any = None, **_: Any) -> Any:
        """Ids ``[prompts, tokens]``, and a mask of those that are not padding."""
        from transformers import BatchEncoding

        most = max_length or self.model_max_length
        width = most if padding == "max_length" else min(TOKENS, most)
        rows = len(text) if isinstance(text, list) else 1
        mask = (torch.arange(width) < TOKENS).long().expand(rows, -1)
        return BatchEncoding({"input_ids": torch.ones((rows, width), dtype=torch.long), "attention_mask": mask})

    def tokenize(self, text: str) -> list[str]:
        """A prompt as it stands."""
        return [text]

    def apply_chat_template(self, messages: Any, *, tokenize: bool = False, **how: Any) -> Any:
        """A prompt of a conversation, or its tokens."""
        return self([""] * len(messages), **how) if tokenize else ""

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        """Nothing that anyone reads."""
        return [""] * len(ids)


class Rehearsal:
    """A base of the general class whose pipeline has run once, and what each network was given.

    Attributes:
        base: with networks on the meta device; it only runs its pipeline.
        calls: of each network, in order: the method's own form, its arguments and its keywords.
    """

    def __init__(self, family: type[Captured], layout: Layout, parts: dict[str, nn.Module], scheduler: Any) -> None:
        """Build the pipeline of networks on the meta device."""
        import diffusers

        tokens = {family.tokenizer_name(name): Tokens() for name in family.encoder_names}
        left_out = {name: None for name in family.left_out if name not in tokens}
        told = {key: one for key, one in layout.index.items() if not key.startswith("_") and not isinstance(one, list)}
        pipeline = getattr(diffusers, family.pipeline_class)(
            **parts, scheduler=scheduler, **left_out, **told, **dict.fromkeys(tokens)
        )
        vars(pipeline).update(tokens)
        _tell_device(pipeline, "_execution_device", "device")
        pipeline.set_progress_bar_config(disable=True)
        base = self.base = family.__new__(family)
        base.id, base.pipeline, base._none = layout.name.strip("'"), pipeline, 1.0
        base.denoiser = parts[family.denoiser_name]
        base._config = base.denoiser.config
        self.calls: dict[str, list[tuple[Callable[..., Any], Any, Any]]] = {}
        self._parts, self._made = parts, torch.empty(0)

    def run(self, width: int, height: int) -> None:
        """Draw one picture in two steps.

        Raises:
            BaseModelError: the pipeline asks for values.
        """
        base = self.base
        base._draw_at(width, height)
        try:
            # Some have no guidance at 1, others at 0.
            for base._none in (1.0, 0.0):
                self.calls = {name: [] for name in self._parts}
                with self._listening(), without_values(), _Copies(), torch.no_grad():
                    base._run(["a"], seeds=[0], guidance_scale=None, num_inference_steps=2, output_type="pt")
                if len(self.calls[base.denoiser_name]) == 2 and len(self._made) == 1:
                    break
        except Exception as fault:
            # Whatever a pipeline, or torch without values, raises.
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise BaseModelError(
                f"what base {base.id} takes cannot be counted, as its pipeline does not run without values: {reason}; "
                "choose levers by hand, such as --set memory.micro_batch=1 (docs/memory.md)"
            ) from fault

    @contextmanager
    def _listening(self) -> Iterator[None]:
        changed = []
        for name, part in self._parts.items():
            kind = "decode" if name == "vae" else "forward"
            own = getattr(part, kind)
            vars(part)[kind] = self._heard(name, own)
            changed.append((part, kind, type(part)))
            _tell_device(part, "device")
        try:
            yield
        finally:
            for part, kind, plain in changed:
                del vars(part)[kind]
                part.__class__ = plain

    def _heard(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name.startswith("text_encoder"):
                # What is padded is computed all the same, and attention looks at a mask's values.
                kwargs = {key: None if key == "attention_mask" else one for key, one in kwargs.items()}
            given = tree_map(_to(META), args), tree_map(_to(META), kwargs)
            self.calls[name].append((own, *given))
            part = self._parts[name]
            heard, part.__class__ = part.__class__, type(part).__mro__[1]
            try:
                made = own(*given[0], **given[1])
                if name == self.base.denoiser_name:
                    self._made = stacked(first_of(made))
                return tree_map(_empty, made)
            finally:
                part.__class__ = heard

        return call

    def told(self) -> Any:
        """Arguments and keywords of the denoiser's first call."""
        return self.calls[self.base.denoiser_name][0][1:]

    def predict(self, told: Any) -> Tensor:
        """The denoiser's prediction for one call's arguments, without values."""
        return stacked(first_of(self.base.denoiser(*told[0], **told[1])))


def _to(device: torch.device) -> Callable[[Any], Any]:
    return lambda one: one.to(device) if isinstance(one, Tensor) else one


def _empty(one: Any) -> Any:
    return torch.zeros(one.shape, dtype=one.dtype) if isinstance(one, Tensor) else one


def _tell_device(thing: Any, *names: str) -> None:
    """Let something say that it is on the CPU, which its pipeline is."""
    kind = type(thing)
    thing.__class__ = type(kind.__name__, (kind,), {name: property(lambda self: HOST) for name in names})


def text_side(rehearsal: Rehearsal, one: Any, other: Any) -> lora.TextSide:
    """The layers that only the prompt passes, by two calls for pictures of different sizes: they read as many rows."""
    denoiser, seen = rehearsal.base.denoiser, []
    for told in (one, other):
        rows: dict[str, tuple[int, ...]] = {}

        def look(name: str, rows: dict[str, tuple[int, ...]] = rows) -> Any:
            return lambda module, args: (
                rows.setdefault(name, tuple(args[0].reshape(-1, args[0].shape[-1]).shape)) and None
            )

        layers = [(name, layer) for name, layer in lora.base_layers(denoiser) if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers]
        with torch.no_grad():
            rehearsal.predict(told)
        for hook in hooks:
            hook.remove()
        seen.append(rows)
    stream = [name for name, read in seen[0].items() if read[0] > 1 and seen[1].get(name) == read]
    return lora.TextSide(frozenset(stream), tuple(stream[:1]))


def text_of(one: Any, other: Any) -> list[Tensor]:
    """Of one call's tensors, those that another size of the picture leaves as large: above all the text's."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return [
        a for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape and a.ndim > 1
    ]


def latents_of(one: Any, other: Any) -> int:
    """Numbers of the latents in a call: the largest tensor that another size of the picture changes."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    moved = [a.numel() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point() and a.shape != b.shape]
    return max(moved, default=0)
