"""More eyes: a vision-language model that is asked about any concept, and several detectors that vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recare_patch.core import EvaluationError, unknown_name
from recare_patch.measure.judges import Detector, can_tell, check_label, load_detector, read_source, short_name
from recare_patch.measure.names import SOURCES

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

QUESTION = "Does this picture show {}? Answer yes or no."

_ANSWERS = {"yes": ("Yes", "yes", " Yes", " yes", "YES"), "no": ("No", "no", " No", " no", "NO")}


class VisionLanguage:
    """A vision-language model that is asked whether a picture shows something: any words will do.

    It is any transformers image-text-to-text model; the answer is what its first token would be, yes or no, whichever
    is likelier of the two. How well it sees a concept is for :mod:`recare_patch.measure.calibration` to say.
    """

    def __init__(
        self,
        *,
        source: str | Path | None = None,
        question: str = QUESTION,
        threshold: float = 0.5,
        device: str = "cpu",
        batch_size: int = 8,
    ) -> None:
        """Only safetensors are read, from a folder or hub id, and no code that comes with them.

        Args:
            question: with {} for what is asked about.
            threshold: share of yes, of yes and no together, above which the answer is yes.
        """
        if "{}" not in question:
            raise EvaluationError(f"the question '{question:.200}' has no {{}} for what is asked about")
        if not 0 < threshold < 1:
            raise EvaluationError(f"threshold must lie between 0 and 1, got {threshold:g}")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        kinds = AutoModelForImageTextToText, AutoProcessor
        self._model, self._processor = read_source(
            "vision-language", source, *kinds, "image-text-to-text model", device
        )
        self.name = f"vision-language ({short_name(str(source))})"
        self._question, self._threshold, self._batch_size = question, threshold, batch_size
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        # Then the last place of every row is where the answer begins.
        self._tokenizer.padding_side = "left"
        yes, no = ({self._first_token(one) for one in _ANSWERS[key]} - {None} for key in ("yes", "no"))
        if not (yes - no and no - yes):
            raise EvaluationError(f"{self.name} cannot answer: its tokenizer has no token of its own for yes or no")
        self._yes, self._no = (torch.tensor(sorted(one), device=device) for one in (yes - no, no - yes))

    def _first_token(self, text: str) -> int | None:
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return next((one for one in ids if one != unknown), None)

    def labels(self) -> tuple[str, ...]:
        """Any words."""
        return ()

    def _asked(self, label: str) -> str:
        question = self._question.replace("{}", label)
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            talk = [{"role": "user", "content": content}]
            return str(self._processor.apply_chat_template(talk, add_generation_prompt=True))
        return f"{getattr(self._processor, 'image_token', '<image>')}\n{question}"

    @torch.no_grad()
    def rate(self, images: Sequence[Image], label: str) -> list[bool]:
        """Whether the answer is yes."""
        text, hits = self._asked(label), list[bool]()
        for start in range(0, len(images), self._batch_size):
            batch = [image.convert("RGB") for image in images[start : start + self._batch_size]]
            given = self._processor(
                images=[[one] for one in batch], text=[text] * len(batch), padding=True, return_tensors="pt"
            )
            given = given.to(self._model.device, self._model.dtype)
            # Of any architecture: some read the text in an encoder, and answer in a decoder.
            made = self._model.generate(
                **given, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            hits += (self._share_of_yes(made.logits[0].float()) > self._threshold).tolist()
        return hits

    def _share_of_yes(self, logits: Tensor) -> Tensor:
        likely = logits.log_softmax(-1)
        yes, no = (likely[:, tokens].logsumexp(-1) for tokens in (self._yes, self._no))
        return (yes - no).sigmoid()


VOTES = ("majority", "any", "all")


class Ensemble:
    """Several detectors that vote on each picture.

    Attributes:
        unanimous: of the last pictures that were rated, those on which all agreed.
    """

    def __init__(
        self,
        *,
        members: Sequence[Mapping[str, Any] | Detector] = (),
        label: str | None = None,
        vote: str = "majority",
        **shared: Any,
    ) -> None:
        """Load the members, and let each answer to its own name of the concept.

        Args:
            members: detectors, or mappings of a "detector", its options, and the "label" that it has for the concept.
            label: what the suite calls the concept: where a member calls it otherwise, nothing else can be asked for.
            vote: "majority" (more than half), "any" or "all".
            shared: ``clip`` and ``device``, for members that take them.
        """
        if len(members) < 2:
            raise EvaluationError(f"an ensemble needs at least two detectors, got {len(members)}")
        if vote not in VOTES:
            raise unknown_name("vote", vote, VOTES)
        self._members: list[Detector] = []
        self._own: list[str | None] = []
        for one in members:
            options = dict(one) if isinstance(one, Mapping) else {}
            self._own.append(options.pop("label", None))
            name = str(options.pop("detector", ""))
            loaded = load_detector(name, **with_shared(name, options, shared)) if isinstance(one, Mapping) else one
            self._members.append(loaded)
        self._label, self._vote = label, vote
        if label is None and any(self._own):
            raise EvaluationError("an ensemble whose detectors call the concept otherwise needs its label")
        self.name = f"ensemble ({', '.join(one.name for one in self._members)}; {vote})"
        self.unanimous: list[bool] = []

    def labels(self) -> tuple[str, ...]:
        """What all its members can tell; empty where each takes any words."""
        if any(self._own):
            return (str(self._label),)
        closed = [one.labels() for one in self._members if one.labels()]
        first = closed[0] if closed else ()
        return tuple(label for label in first if all(can_tell(one, label) for one in self._members))

    def rate(self, images: Sequence[Image], label: str) -> list[bool]:
        """What the vote says."""
        label = check_label(self, label)
        asked = [own or label for own in self._own]
        each = zip(*(one.rate(images, own) for one, own in zip(self._members, asked, strict=True)), strict=True)
        counts, most = [sum(map(bool, votes)) for votes in each], len(self._members)
        self.unanimous = [count in (0, most) for count in counts]
        least = {"any": 1, "all": most, "majority": most // 2 + 1}[self._vote]
        return [count >= least for count in counts]


def with_shared(name: str, options: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's options, with what a run gives to those that take it: a loaded ``clip``, and the ``device``.

    The clip may be a call that gives it, which is made only where it is needed.
    """
    found = dict(options)
    for key in {"clip": ("clip",), "ensemble": ("clip", "device")}.get(name, ("device",) if name in SOURCES else ()):
        if key in shared and key not in found:
            given = shared[key]
            found[key] = given() if key == "clip" and name == "clip" and callable(given) else given
    return found
