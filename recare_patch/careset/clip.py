"""CLIP: pictures and texts as unit vectors in one space, and the words that its tokenizer knows.

The CARE-set is mined with it and the scores are read with it (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import ClipError

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.core import Progress

BUNDLED = "atelier"
"""The name of the CLIP that the package ships."""

DEFAULT_HUB_CLIP = "openai/clip-vit-base-patch32"
"""The CLIP of the paper's CARE-set and scores."""

_FUNCTION = """
    about above across after again against all almost along already also although always among and
    another any anyone anything are around aren because been before behind being below beneath beside
    besides between beyond both but can cannot could couldn did didn does doesn doing don done down
    during each either else enough even ever every everyone everything few for from further get gets
    getting gone got had hadn has hasn have haven having her here hers herself him himself his how
    however inside instead into isn its itself just least less let lets like made make makes making many
    may maybe mayn might mine more most much must mustn myself near neither never nobody none nor not
    nothing now off often once one only onto other others ought our ours ourselves out outside over own
    per perhaps quite rather really same several shall shan she should shouldn since some somebody
    someone something somewhat somewhere still such than that the their theirs them themselves then
    there therefore these they this those though through throughout thus till together too toward
    towards under underneath until unto upon usually very via was wasn were weren what whatever when
    whenever where wherever whether which whichever while who whoever whole whom whose why will with
    within without won would wouldn yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())
"""English words that name no thing: articles, pronouns, prepositions, auxiliaries."""

_MEDIUM = """
    art artist artistic artists artwork artworks canvas canvases drawing drawings drawn fresco graphic
    graphics illustrated illustration illustrations image images oil paint painted painter painters
    painting paintings pastel pencil photo photograph photographed photographer photographers
    photographic photographs photography photos pic pics picture pictures poster posters print printed
    prints render rendered rendering screenshot selfie selfies sketch sketched sketches snapshot
    snapshots style styled styles video videos wallpaper wallpapers watercolor watercolors watercolour
    watercolours
"""
MEDIUM_WORDS = frozenset(_MEDIUM.split())
"""Words that say how a picture was made, which every prompt template says already."""

_NEVER_IN_TEXT = (0xC0, 0xC1, *range(0xF5, 0x100))
"""Bytes that UTF-8 never uses: their tokens cannot have occurred in any training text."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class DroppedToken:
    """A vocabulary token that is no word to mine.

    Attributes:
        token: the token as the tokenizer writes it, without its end-of-word mark.
        reason: why, in a few words.
    """

    token: str
    reason: str


def default_clip(base_id: str) -> str:
    """The CLIP that fits a base model when none is named.

    Args:
        base_id: the base's id: "atelier" for the bundled one.
    """
    return BUNDLED if base_id.strip().casefold() == BUNDLED else DEFAULT_HUB_CLIP


class Clip:
    """A transformers ``CLIPModel`` with its tokenizer and image processor, in float32.

    Attributes:
        id: the source it was loaded from.
        device: where it computes; features come back on the CPU.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, *, id: str, device: str | torch.device = "cpu"
    ) -> None:
        """Wrap parts that are loaded already.

        Args:
            model: a ``CLIPModel``.
            tokenizer: a ``CLIPTokenizer``.
            image_processor: a CLIP image processor.
            id: what to call it in files and messages.
            device: where to compute.
        """
        self.id = id
        self.device = torch.device(device)
        self._model = model.to(device=self.device, dtype=torch.float32).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._vocabulary: tuple[list[str], list[DroppedToken]] | None = None

    @classmethod
    def load(cls, source: str = BUNDLED, *, device: str | torch.device = "cpu") -> Clip:
        """Load a CLIP model.

        Args:
            source: "atelier" for the bundled one, a folder that holds a CLIPModel with tokenizer
                and image processor, or the id of one on the model hub.
            device: where to compute.

        Raises:
            ClipError: nothing there, a part is missing, or it is no CLIPModel.
        """
        name = source.strip()
        if name.casefold() == BUNDLED:
            folder = Path(__file__).parents[1] / "models" / "atelier" / "weights" / "clip"
            if not folder.is_dir():
                raise ClipError(
                    "the bundled CLIP is not in this installation: reinstall the package, or run "
                    "'python -m benchmarks.atelier train'"
                )
            return cls._from(str(folder), BUNDLED, device)
        path = Path(name).expanduser()
        if name and path.exists():
            _check_folder(path)
            return cls._from(str(path), name, device)
        if not _HUB_ID.fullmatch(name) or name.startswith((".", "-")):
            raise ClipError(f"no CLIP model at '{source}': give a folder, a hub id, or 'atelier'")
        return cls._from(name, name, device)

    @classmethod
    def _from(cls, place: str, name: str, device: str | torch.device) -> Clip:
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        try:
            config = AutoConfig.from_pretrained(place)
            if config.model_type != "clip" or not hasattr(config, "vision_config"):
                raise ClipError(
                    f"'{name}' is no CLIPModel with text and vision: its config says '{config.model_type}'"
                )
            with _quiet():
                model, report = CLIPModel.from_pretrained(
                    place, dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
                processor = _image_processor_class().from_pretrained(place)
            tokenizer = CLIPTokenizer.from_pretrained(place)
        except ClipError:
            raise
        # Whatever transformers, safetensors or the hub client raise here means one thing to the user.
        except Exception as fault:
            raise ClipError(f"cannot load CLIP from '{name}': {_first_sentence(fault)}") from fault
        missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
        if missing:
            raise ClipError(
                f"the CLIP in '{name}' lacks {len(missing)} of its weights, the first being {missing[0]}"
            )
        if len(tokenizer) > config.text_config.vocab_size:
            raise ClipError(
                f"the CLIP in '{name}' knows {config.text_config.vocab_size} tokens, "
                f"but its tokenizer has {len(tokenizer)}"
            )
        if any(not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
            raise ClipError(f"the CLIP in '{name}' has weights that are not finite numbers")
        return cls(model, tokenizer, processor, id=name, device=device)

    @property
    def width(self) -> int:
        """The length of a feature vector."""
        return int(self._model.config.projection_dim)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image], batch_size: int = 32) -> Tensor:
        """Unit features of pictures.

        Args:
            images: pictures of any size.
            batch_size: pictures encoded together; changes memory and speed only.

        Returns:
            float32 tensor ``[len(images), width]`` on the CPU.
        """
        rows = [torch.empty(0, self.width)]
        for start in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[start : start + batch_size]]
            pixels = self._image_processor(images=batch, return_tensors="pt")["pixel_values"]
            pooled = self._model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            rows.append(F.normalize(self._model.visual_projection(pooled), dim=-1).float().cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def image_layers(self, images: Sequence[Image]) -> tuple[Tensor, list[Tensor]]:
        """Unit features of pictures, and what each layer of the vision tower makes of their patches.

        Args:
            images: pictures of any size, encoded together.

        Returns:
            features ``[len(images), width]``, and for each layer its hidden states without the class
            token, ``[len(images), patches, hidden]``; float32, on the CPU.
        """
        batch = [image.convert("RGB") for image in images]
        pixels = self._image_processor(images=batch, return_tensors="pt")["pixel_values"]
        found = self._model.vision_model(pixel_values=pixels.to(self.device), output_hidden_states=True)
        features = F.normalize(self._model.visual_projection(found.pooler_output), dim=-1)
        return features.float().cpu(), [layer[:, 1:].float().cpu() for layer in found.hidden_states[1:]]

    @torch.no_grad()
    def text_features(
        self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None
    ) -> Tensor:
        """Unit features of texts.

        Args:
            texts: words or sentences; what is longer than the tower reads is cut.
            batch_size: texts encoded together; changes memory and speed only.
            progress: told about every batch.

        Returns:
            float32 tensor ``[len(texts), width]`` on the CPU.
        """
        rows = [torch.empty(0, self.width)]
        longest = int(self._model.config.text_config.max_position_embeddings)
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            # The tower is causal and read at the end of text: padding behind it changes nothing.
            tokens = self._tokenizer(
                batch, padding="longest", max_length=longest, truncation=True, return_tensors="pt"
            )
            pooled = self._model.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
            rows.append(F.normalize(self._model.text_projection(pooled), dim=-1).float().cpu())
            if progress is not None:
                progress.update("words", min(start + batch_size, len(texts)), len(texts))
        return torch.cat(rows)

    def vocabulary(self) -> tuple[list[str], list[DroppedToken]]:
        """The tokenizer's whole words, and what else it holds with the reason it is left out.

        A byte-pair vocabulary is mostly pieces of words. A token counts as a word when it ends
        one, is of at least three plain letters with a vowel among them, is what the tokenizer
        makes of that word alone, was ever met in training (see :meth:`_never_met`), and is neither
        a function word nor the name of a medium. Endings that do occur alone ("ville") cannot be
        told from words without a dictionary, and stay.

        Returns:
            words in the tokenizer's order (the most frequent first), and the tokens left out.
        """
        if self._vocabulary is None:
            self._vocabulary = self._sort_tokens()
        words, dropped = self._vocabulary
        return list(words), list(dropped)

    def _sort_tokens(self) -> tuple[list[str], list[DroppedToken]]:
        by_id = sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        special = frozenset(self._tokenizer.all_special_tokens)
        never_met = self._never_met()
        words: list[tuple[str, int]] = []
        dropped: list[DroppedToken] = []
        for token, index in by_id:
            word = token.removesuffix("</w>")
            if token in special:
                reason = "marks the start or end of a text"
            elif not token.endswith("</w>"):
                reason = "a piece of a word, not its end"
            elif not (word.isascii() and word.isalpha()):
                reason = "not made of plain letters"
            elif len(word) < 3:
                reason = "shorter than three letters"
            elif not set(word.lower()) & set("aeiouy"):
                reason = "no vowel: an abbreviation or a piece of a word"
            elif index in never_met:
                reason = "a piece of longer words, never met alone in CLIP's training"
            elif word.lower() in FUNCTION_WORDS:
                reason = "a function word"
            elif word.lower() in MEDIUM_WORDS:
                reason = "names a medium, not what a picture shows"
            else:
                words.append((word, index))
                continue
            dropped.append(DroppedToken(word, reason))
        kept = []
        encoded = (
            self._tokenizer([word for word, _ in words], add_special_tokens=False)["input_ids"]
            if words
            else []
        )
        for (word, index), tokens in zip(words, encoded, strict=True):
            if list(tokens) == [index]:
                kept.append(word)
            else:
                dropped.append(DroppedToken(word, "a piece of a word: written alone, it is split otherwise"))
        return kept, dropped

    def _never_met(self) -> frozenset[int]:
        """Tokens whose embedding is no farther from its start than that of an impossible token.

        A token that every text absorbs into a longer one ("ight" in "night") gets no gradient: its
        embedding only decays, like those of the thirteen bytes that UTF-8 excludes. Their norms
        say what "never met" looks like; above their mean by four standard deviations is learned.
        """
        weight = self._model.text_model.embeddings.token_embedding.weight
        norms = weight.detach().float().norm(dim=1).cpu()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        letters = _byte_letters()
        impossible = [
            vocabulary[letters[byte] + end]
            for byte in _NEVER_IN_TEXT
            for end in ("", "</w>")
            if letters[byte] + end in vocabulary
        ]
        if len(impossible) < 8:
            return frozenset()
        reference = norms[impossible]
        limit = reference.mean() + 4 * reference.std()
        # What was merged last is a piece of nothing. If most of that looks unmet too, the model is
        # untrained or trained otherwise, and norms say nothing.
        longest = [index for token, index in vocabulary.items() if token.endswith("</w>") and len(token) >= 8]
        if not longest or float((norms[longest] > limit).float().mean()) <= 0.5:
            return frozenset()
        return frozenset((norms <= limit).nonzero().flatten().tolist())


def _check_folder(path: Path) -> None:
    """Refuse a folder that is plainly no CLIPModel before transformers gets to see it."""
    if not path.is_dir():
        raise ClipError(
            f"'{path}' is a file: a CLIP is a folder with config, weights, tokenizer and image processor"
        )
    if (path / "model_index.json").exists():
        raise ClipError(
            f"'{path}' is a diffusers pipeline: --clip takes the folder of a transformers CLIPModel"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClipError(f"'{path}' is no CLIP model: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as fault:
        raise ClipError(f"the config.json of the CLIP in '{path}' cannot be read") from fault
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip" or "vision_config" not in config:
        raise ClipError(f"'{path}' is no CLIPModel with text and vision: its config says '{kind}'")
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise ClipError(f"the CLIP in '{path}' has no weights: {_WEIGHTS[0]} is missing")
    if not any(all((path / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ClipError(
            f"the CLIP in '{path}' has no tokenizer: tokenizer.json or vocab.json with merges.txt is missing"
        )
    if not (path / "preprocessor_config.json").is_file() and not (path / "processor_config.json").is_file():
        raise ClipError(f"the CLIP in '{path}' has no image processor: preprocessor_config.json is missing")


def _first_sentence(fault: BaseException) -> str:
    """The start of a foreign error, on one line."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    first = re.split(r"(?<=[.!?])\s", text)[0]
    return (first if len(first) <= 200 else first[:199] + "…").rstrip(".")


def _image_processor_class() -> Any:
    """The image processor that needs no torchvision, whatever it is called in this transformers."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading report out of the user's terminal: what matters of it is an error here."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _byte_letters() -> dict[int, str]:
    """The printable stand-in of every byte in a byte-level BPE (Radford et al., GPT-2, 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(0x100):
        if byte not in letters:
            letters[byte] = chr(0x100 + len(letters) - len(printable))
    return letters
