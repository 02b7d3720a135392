"""Levers for a card: what a piece of work takes under them, and the fastest set that fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recare_patch.core import RecipeError
from recare_patch.models.footprint import Footprint, measure
from recare_patch.models.loading import chosen_device, find_layout, load_base, usable_precision
from recare_patch.recipe import Concept, MemoryOptions, Recipe

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

logger = logging.getLogger(__name__)

USED = 0.7
"""Share of a card's GB that a plan fills; the driver, fragments and other programs take some too."""

GB = 1e9
"""Bytes. A card sold as 12 GB has 12 GiB, 7 % more; that is left to others too."""

_WEIGHT_BYTES = {"int8": 1.01, "nf4": 0.5625}
"""Of a quantized weight, with the scales of its row or block."""


@dataclass(frozen=True)
class Load:
    """What one piece of work asks of a base at its worst moment.

    Attributes:
        pictures: drawn together from as many prompts, then decoded.
        guided: whether guidance doubles their samples.
        trained, predicted: samples of one prediction that gradients flow through, and that they do not.
        encoded: prompts that are encoded without a gradient.
        reads: prompts that are encoded with one, and whose activations wait for it.
        held: bytes that live on the device all the while, beside the weights.
        looks: bytes of what looks at pictures or reads words, on the device while the encoders may be: CLIP.
    """

    pictures: int = 0
    guided: bool = True
    trained: int = 0
    predicted: int = 0
    encoded: int = 0
    reads: int = 0
    held: int = 0
    looks: int = 0


def resident(found: Footprint, memory: MemoryOptions) -> int:
    """Bytes of the weights that stay on the device throughout."""
    denoiser = found.block if memory.offload else found.denoiser - _saved(found, memory, found.linear)
    encoders = 0 if memory.encoders_off_device else reading_weights(found, memory)
    vae = 0 if memory.vae_off_device else found.vae
    return int(denoiser + encoders + vae)


def _saved(found: Footprint, memory: MemoryOptions, linear: int) -> float:
    """Bytes that quantizing so many weights saves."""
    return linear * (found.size - _WEIGHT_BYTES.get(memory.weights, found.size))


def reading_weights(found: Footprint, memory: MemoryOptions) -> int:
    """Bytes of the text encoders' weights on the device."""
    return int(found.encoders - _saved(found, memory, found.read_linear))


def peak(found: Footprint, memory: MemoryOptions, load: Load) -> int:
    """Bytes on the device at the worst moment of a piece of work."""
    fixed, most = resident(found, memory) + load.held, memory.micro_batch or 10**6
    encoders = reading_weights(found, memory) if memory.encoders_off_device else 0
    # It waits on the host as the text encoders do, and comes to look while nothing else works.
    moments = [fixed + load.looks]
    if not memory.encoders_off_device:
        fixed += load.looks
    # Every stage reads a prompt or two: the parts of a table of embeddings, and the table that they are joined to.
    encoded = max(load.encoded, load.pictures, 1)
    moments.append(fixed + encoders + min(encoded, found.encoded_at_once) * found.encoding + 2 * encoded * found.row)
    if load.pictures:
        each = 2 if load.guided else 1
        samples = max(1, min(load.pictures, most // each)) * each
        # Their prompts are there twice, one beside the other where guidance has two of them.
        moments.append(fixed + samples * (found.predicting + 2 * found.row))
        decoded = found.tiled if memory.vae_tiling else min(found.decoded_at_once, most) * found.decoding
        moments.append(fixed + (found.vae if memory.vae_off_device else 0) + decoded)
    if load.trained or load.predicted or load.reads:
        one = found.checkpointed if memory.checkpointing else found.training
        work = max(min(load.trained, most) * one, min(load.predicted, most) * found.predicting)
        # Where word vectors are fitted, the encoders take part in the backward pass.
        reads = load.reads * (found.forgetful if memory.checkpointing else found.reading)
        moments.append(fixed + (encoders if load.reads else 0) + reads + work)
    return max(moments)


_DRAWING: tuple[dict[str, Any], ...] = ({}, *({"micro_batch": size} for size in (16, 8, 4, 2)))
_TRAINING: tuple[dict[str, Any], ...] = (
    {},
    *({"micro_batch": size} for size in (8, 4, 2, 1)),
    *({"micro_batch": size, "checkpointing": True} for size in (8, 4, 2, 1)),
)
_LAST: tuple[dict[str, Any], ...] = (
    {"micro_batch": 1, "checkpointing": True, "weights": "int8"},
    {"micro_batch": 1, "checkpointing": True, "weights": "nf4"},
    {"micro_batch": 1, "checkpointing": True, "offload": True},
)
"""Levers from fast to slow; those before int8 change no result. Parts that wait off the device cost little,
and come first of all."""


def lever_sets(own: MemoryOptions, *, trains: bool = True, exact: bool = False) -> Iterator[MemoryOptions]:
    """Sets of levers from fast to slow: those that are set already stay, their micro batch as the most.

    Args:
        own: what is set.
        trains: whether anything does; what only helps training is left out otherwise.
        exact: without other weights, which would draw as another model does.
    """
    given = own.model_dump(exclude_defaults=True)
    last = [one for one in _LAST if not exact or "weights" not in one]
    for levers in (*(_TRAINING if trains else _DRAWING), *last):
        for tiling in (False, True):
            kept = {"encoders_off_device": True, "vae_off_device": True, "vae_tiling": tiling, **levers, **given}
            if "micro_batch" in given:
                # What is set for one card is the most that another one takes at once.
                kept["micro_batch"] = min(given["micro_batch"], levers.get("micro_batch", given["micro_batch"]))
            yield MemoryOptions(**kept)


def first_fit(
    name: str, sets: Iterator[MemoryOptions], peak_of: Callable[[MemoryOptions], int], gigabytes: float
) -> MemoryOptions:
    """The first set of levers whose peak fills at most :data:`USED` of a card.

    Raises:
        RecipeError: none does.
    """
    smallest = math.inf
    for memory in sets:
        taken = peak_of(memory)
        smallest = min(smallest, taken)
        if taken <= USED * gigabytes * GB:
            return memory
    raise RecipeError(
        f"nothing makes base '{name}' fit into {gigabytes:g} GB: the smallest set of levers is "
        f"expected to take {smallest / GB:.1f} GB, and {USED * gigabytes:.1f} are used of such a card; a "
        "smaller memory.resolution takes less"
    )


def drawing_precision(recorded: str | None, device: torch.device) -> str:
    """The precision to draw in where none is asked for: fp32 on the CPU, else a recipe's, or bf16 (else fp16)."""
    return "fp32" if device.type == "cpu" else usable_precision(recorded or "bf16", device)[0]


def load_to_draw(
    source: str | Path,
    *,
    precision: str | None = None,
    recorded: str | None = None,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    load: Load | None = None,
) -> LatentDiffusion:
    """A base to draw with, and perhaps to attack, at the precision and with the levers that its device asks for.

    Args:
        source, device, memory: as :func:`load_base` takes them.
        precision: None: :func:`drawing_precision` of ``recorded``, which a patch's recipe names.
        vram: GB of a card for which further levers are chosen; none of them changes weights.
        load: what will be asked of it; by default, eight pictures at once.

    Raises:
        RecipeError: nothing fits the card.
    """
    place, memory = chosen_device(device), memory or MemoryOptions()
    load = load or Load(pictures=8)
    precision = precision or drawing_precision(recorded, place)
    if vram is not None:
        precision, _ = usable_precision(precision, place)
        layout, name = find_layout(source)
        asked = Recipe(concept=Concept(text="any", kind="object"), precision=precision, memory=memory)
        found, sets = measure(layout, asked), lever_sets(memory, trains=bool(load.trained), exact=True)
        memory = first_fit(name, sets, lambda one: peak(found, one, load), vram)
        logger.info("for %g GB: %s, %s", vram, precision, memory.in_words())
    return load_base(source, precision=precision, device=place, memory=memory)
