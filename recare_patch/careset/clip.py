"""CLIP: pictures and texts as unit vectors in one space, and the words that its tokenizer knows.

The CARE-set is mined with it and the scores are read with it (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import text_cache
from recare_patch.core import ClipError
from recare_patch.models import ask_hub, snapshots, told

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.core import Progress

BUNDLED = "atelier"
"""The name of the CLIP that the package ships."""

DEFAULT_HUB_CLIP = "openai/clip-vit-base-patch32"
"""The CLIP of the paper's CARE-set and scores."""

_REVISIONS = {DEFAULT_HUB_CLIP: "c237dc49a33fc61debc9276459120b7eac67e7ef"}
"""Hub id → the commit that is taken, of ``refs/pr/66``: the main revision has its weights as a pickle alone."""

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
"""Bytes that UTF-8 never uses: their tokens, which a byte-level BPE writes as these very letters, cannot
have occurred in any training text."""

_MANY = 1000
"""Texts that are a lexicon, and no prompts of one run."""

_LARGE = 10_000_000
"""Parameters of a text tower whose features of a lexicon are worth a file."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PARTS = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Part of a CLIP's folder → the files that it can be in."""


def default_clip(base_id: str) -> str:
    """The CLIP that fits a base model when none is named: the bundled one for the bundled base."""
    return BUNDLED if base_id.strip().casefold() == BUNDLED else DEFAULT_HUB_CLIP


class Clip:
    """A transformers ``CLIPModel`` with its tokenizer and image processor, in float32.

    Features come back on the CPU, wherever it computes.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, *, id: str, device: str | torch.device = "cpu"
    ) -> None:
        """Wrap parts that are loaded already; files and messages call it ``id``."""
        self.id = id
        self.device = torch.device(device)
        self._model = model.to(device=self.device, dtype=torch.float32).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._vocabulary: tuple[list[str], list[tuple[str, str]]] | None = None
        self._kept: dict[str, Tensor] = {}
        self._digest = ""  # of the text tower, where it was asked for

    @classmethod
    def load(cls, source: str = BUNDLED, *, device: str | torch.device = "cpu") -> Clip:
        """Load "atelier" (bundled), a folder of a CLIPModel with all its parts, or one from the model hub.

        Raises:
            ClipError: nothing there, a part is missing, or it is no CLIPModel.
        """
        name = source.strip()
        place = Path(name).expanduser()
        if name.casefold() == BUNDLED:
            name, place = BUNDLED, Path(__file__).parents[1] / "models" / "atelier" / "weights" / "clip"
            if not place.is_dir():
                raise ClipError(
                    "the bundled CLIP is not in this installation: reinstall the package, or run "
                    "'python -m benchmarks.atelier train'"
                )
        elif name and place.exists():
            _check_folder(place)
        elif _HUB_ID.fullmatch(name) and not name.startswith((".", "-")):
            return cls._read(_hub_places(name), name, device)
        else:
            raise ClipError(f"no CLIP model at '{source}': give a folder, a hub id, or 'atelier'")
        return cls._read(dict.fromkeys(_PARTS, str(place)), name, device)

    @classmethod
    def _read(cls, places: Mapping[str, str], name: str, device: str | torch.device) -> Clip:
        import transformers

        # The image processor that needs no torchvision, whatever it is called in this transformers.
        processors = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            config = transformers.AutoConfig.from_pretrained(places["configuration"])
            if config.model_type != "clip" or not hasattr(config, "vision_config"):
                raise ClipError(f"'{name}' is no CLIPModel with text and vision: its config says '{config.model_type}'")
            with _quiet():
                options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
                model, report = transformers.CLIPModel.from_pretrained(places["weights"], config=config, **options)
                processor = processors.from_pretrained(places["image processor"])
            tokenizer = transformers.CLIPTokenizer.from_pretrained(places["tokenizer"])
        except ClipError:
            raise
        # Whatever transformers, safetensors or the hub client raise here means one thing to the user.
        except Exception as fault:
            told = " ".join(str(fault).split()) or type(fault).__name__
            told = re.split(r"(?<=[.!?])\s", told)[0]
            told = (told if len(told) <= 200 else told[:199] + "…").rstrip(".")
            raise ClipError(f"cannot load CLIP from '{name}': {told}") from fault
        missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
        if missing:
            raise ClipError(f"the CLIP in '{name}' lacks {len(missing)} of its weights, the first being {missing[0]}")
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

    def _see(self, images: Sequence[Image], layers: bool = False) -> tuple[Tensor, Any]:
        batch = [image.convert("RGB") for image in images]
        pixels = self._image_processor(images=batch, return_tensors="pt")["pixel_values"]
        found = self._model.vision_model(pixel_values=pixels.to(self.device), output_hidden_states=layers)
        features = F.normalize(self._model.visual_projection(found.pooler_output), dim=-1)
        return features.float().cpu(), found.hidden_states

    @torch.no_grad()
    def image_features(self, images: Sequence[Image], batch_size: int = 32) -> Tensor:
        """Unit features of pictures of any size, float32 ``[len(images), width]``."""
        rows = [torch.empty(0, self.width)]
        for start in range(0, len(images), batch_size):
            rows.append(self._see(images[start : start + batch_size])[0])
        return torch.cat(rows)

    @torch.no_grad()
    def image_layers(self, images: Sequence[Image]) -> tuple[Tensor, list[Tensor]]:
        """Unit features of pictures, and what each layer of the vision tower makes of their patches.

        The layers' states are without the class token, float32 ``[len(images), patches, hidden]``.
        """
        features, states = self._see(images, layers=True)
        return features, [layer[:, 1:].float().cpu() for layer in states[1:]]

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """Unit features of texts, float32 ``[len(texts), width]``; what the tower cannot read is cut.

        A whole lexicon takes minutes on a CPU: features of so many texts are kept, and not computed twice.
        Those of a large tower are kept between runs too, and rounded to float16 in each.
        """
        if len(texts) >= _MANY:
            new = [text for text in dict.fromkeys(texts) if text not in self._kept]
            self._kept |= zip(new, self._lexicon_features(new, batch_size, progress), strict=True)
            return torch.stack([self._kept[text] for text in texts])
        return self._read_texts(texts, batch_size, progress)

    def _lexicon_features(self, texts: Sequence[str], batch_size: int, progress: Progress | None) -> Tensor:
        tower = (self._model.text_model, self._model.text_projection)
        if sum(weight.numel() for part in tower for weight in part.parameters()) < _LARGE or not texts:
            return self._read_texts(texts, batch_size, progress)
        self._digest = self._digest or text_cache.network_digest(*tower)
        key = text_cache.list_key(self._digest, self._tokenizer(list(texts))["input_ids"])
        found = text_cache.kept(key, (len(texts), self.width))
        if found is None:
            found = self._read_texts(texts, batch_size, progress).half()
            text_cache.keep(key, found)
        return found.float()

    def _read_texts(self, texts: Sequence[str], batch_size: int, progress: Progress | None) -> Tensor:
        rows = [torch.empty(0, self.width)]
        longest = int(self._model.config.text_config.max_position_embeddings)
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            # The tower is causal and read at the end of text: padding behind it changes nothing.
            tokens = self._tokenizer(batch, padding="longest", max_length=longest, truncation=True, return_tensors="pt")
            pooled = self._model.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
            rows.append(F.normalize(self._model.text_projection(pooled), dim=-1).float().cpu())
            if progress is not None:
                progress.update("words", min(start + batch_size, len(texts)), len(texts))
        return torch.cat(rows)

    def vocabulary(self) -> tuple[list[str], list[tuple[str, str]]]:
        """The tokenizer's whole words, and what else it holds with the reason it is left out.

        A byte-pair vocabulary is mostly pieces of words. A token counts as a word when it ends
        one, is of at least three plain letters with a vowel among them, is what the tokenizer
        makes of that word alone, was ever met in training (see :meth:`_never_met`), and is neither
        a function word nor the name of a medium. Endings that do occur alone ("ville") cannot be
        told from words without a dictionary, and stay. The most frequent word is the first.
        """
        if self._vocabulary is None:
            words: list[tuple[str, int]] = []
            dropped: list[tuple[str, str]] = []
            special, never_met = frozenset(self._tokenizer.all_special_tokens), self._never_met()
            for token, index in sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
                reason = _no_word(token, special, index in never_met)
                if reason is None:
                    words.append((token.removesuffix("</w>"), index))
                else:
                    dropped.append((token.removesuffix("</w>"), reason))
            texts = [word for word, _ in words]
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            whole = [list(found) == [index] for (_, index), found in zip(words, ids, strict=True)]
            split = "a piece of a word: written alone, it is split otherwise"
            dropped += [(text, split) for text, one in zip(texts, whole, strict=True) if not one]
            self._vocabulary = [text for text, one in zip(texts, whole, strict=True) if one], dropped
        return list(self._vocabulary[0]), list(self._vocabulary[1])

    def _never_met(self) -> frozenset[int]:
        """Tokens whose embedding is no farther from its start than that of an impossible token.

        A token that every text absorbs into a longer one ("ight" in "night") gets no gradient: its
        embedding only decays, like those of the thirteen bytes that UTF-8 excludes. Their norms
        say what "never met" looks like; above their mean by four standard deviations is learned.
        """
        weight = self._model.text_model.embeddings.token_embedding.weight
        norms = weight.detach().float().norm(dim=1).cpu()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        letters = [chr(byte) + end for byte in _NEVER_IN_TEXT for end in ("", "</w>")]
        impossible = [vocabulary[letter] for letter in letters if letter in vocabulary]
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


def _no_word(token: str, special: frozenset[str], never_met: bool) -> str | None:
    """Why a token is no word to mine; None: it is one."""
    word = token.removesuffix("</w>")
    reasons = {
        "marks the start or end of a text": token in special,
        "a piece of a word, not its end": not token.endswith("</w>"),
        "not made of plain letters": not (word.isascii() and word.isalpha()),
        "shorter than three letters": len(word) < 3,
        "no vowel: an abbreviation or a piece of a word": not set(word.lower()) & set("aeiouy"),
        "a piece of longer words, never met alone in CLIP's training": never_met,
        "a function word": word.lower() in FUNCTION_WORDS,
        "names a medium, not what a picture shows": word.lower() in MEDIUM_WORDS,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _hub_places(hub_id: str) -> dict[str, str]:
    """Where the parts of a CLIP on the hub are: in the cache, if need be at two commits, or under its own name.

    Raises:
        ClipError: it is not in the cache, and the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    commit = _REVISIONS.get(hub_id)
    there = snapshots(hub_id, first=commit or "main")
    has = {part: [one for one in there if any((one / file).is_file() for file in _PARTS[part])] for part in _PARTS}
    if all(has.values()):
        # Where the weights came from a pull request's commit, the rest may have come from the main revision.
        whole = [one for one in there if all(one in found for found in has.values())]
        return {part: str((whole or found)[0]) for part, found in has.items()}
    try:
        ask_hub(hub_id, commit)
        if commit is not None:
            patterns = ["*.json", "*.txt", "model*.safetensors"]
            return dict.fromkeys(_PARTS, str(snapshot_download(hub_id, revision=commit, allow_patterns=patterns)))
    # Whatever the hub's client raises means one thing to the user.
    except Exception as fault:
        lacking = [part for part, found in has.items() if not found]
        found = f"has no {' and no '.join(lacking)}" if len(lacking) < len(_PARTS) else "is not"
        raise ClipError(f"CLIP {hub_id} {found} in the hub's cache, and {told(fault, hub_id)}") from fault
    # transformers finds weights in pull requests, too.
    return dict.fromkeys(_PARTS, hub_id)


def _check_folder(path: Path) -> None:
    """Refuse a folder that is plainly no CLIPModel before transformers gets to see it."""
    if not path.is_dir():
        raise ClipError(f"'{path}' is a file: a CLIP is a folder with config, weights, tokenizer and image processor")
    if (path / "model_index.json").exists():
        raise ClipError(f"'{path}' is a diffusers pipeline: --clip takes the folder of a transformers CLIPModel")
    for part, files in _PARTS.items():
        if not any((path / file).is_file() for file in files):
            if part == "weights" and (path / "pytorch_model.bin").is_file():
                raise ClipError(
                    f"'{path}' has its weights only as a pickle (pytorch_model.bin), which can run code: fetch a "
                    f"revision with safetensors, as `hf download {DEFAULT_HUB_CLIP} --revision "
                    f"{_REVISIONS[DEFAULT_HUB_CLIP]}` does, or give --clip {DEFAULT_HUB_CLIP}, which takes that one"
                )
            raise ClipError(f"'{path}' is no CLIP model: it has no {part} ({files[0]} is missing)")


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
