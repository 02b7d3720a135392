"""A small classifier that says what an Atelier picture shows.

It is trained on drawn scenes alone and never sees a generated picture, nor the CLIP model that
chooses the CARE-set, so its scores lean on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.models.atelier import JUDGE
from recare_patch.models.atelier.labels import GROUNDS, OBJECTS, PEOPLE, SIZE, SKY, STYLES, TIMES

THINGS = (*OBJECTS, *SKY)
LABELS = (*STYLES, *TIMES, *GROUNDS, *THINGS)
_GROUPS = (len(STYLES), len(TIMES), len(GROUNDS), len(THINGS))


class JudgeNetwork(nn.Module):
    """Convolutions over ``[batch, 3, 64, 64]`` pictures in ``[-1, 1]``; one logit a label."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 4 * width):
            for taken, stride in ((channels, 1), (out, 2)):
                convolution = nn.Conv2d(taken, out, 3, padding=1, stride=stride, bias=False)
                layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        # Two poolings: where a thing is small, the maximum sees it; a style is seen by the mean.
        self.head = nn.Linear(2 * channels, len(LABELS))

    def forward(self, pixels: Tensor) -> Tensor:
        """One logit for each of :data:`LABELS`, ``[batch, labels]``."""
        maps = self.features(pixels)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))


def targets(labels: Sequence[frozenset[str]]) -> Tensor:
    """Label sets as a 0/1 matrix ``[batch, len(LABELS)]`` in the order of :data:`LABELS`."""
    return torch.tensor([[float(name in found) for name in LABELS] for found in labels])


def judge_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy for style, time and ground; binary cross-entropy for each thing."""
    parts, truth = logits.split(_GROUPS, dim=1), wanted.split(_GROUPS, dim=1)
    exclusive = sum(F.cross_entropy(p, t.argmax(1)) for p, t in zip(parts[:3], truth[:3], strict=True))
    return exclusive + 5 * F.binary_cross_entropy_with_logits(parts[3], truth[3])


def to_pixels(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Pictures as ``[batch, 3, SIZE, SIZE]`` in ``[-1, 1]``, resized where they need it."""
    arrays = [
        np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        if isinstance(image, Image.Image)
        else image
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """Names what pictures show."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> Judge:
        """The bundled judge, or the one in a ``judge.safetensors`` file."""
        path = path or JUDGE
        network = JudgeNetwork()
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image] | np.ndarray) -> list[frozenset[str]]:
        """The labels of each picture: one style, time and ground, and every thing present."""
        found: list[frozenset[str]] = []
        for start in range(0, len(images), 128):
            logits = self.network(to_pixels(images[start : start + 128]))
            style, time, ground, things = logits.split(_GROUPS, dim=1)
            for row in range(len(logits)):
                present = {THINGS[i] for i in range(len(THINGS)) if things[row, i] > 0}
                for words, group in ((STYLES, style), (TIMES, time), (GROUNDS, ground)):
                    present.add(words[int(group[row].argmax())])
                if present & {"nude", *PEOPLE}:
                    present.add("person")
                found.append(frozenset(present))
        return found

    def rate(self, images: Sequence[Image.Image] | np.ndarray, label: str) -> float:
        """The fraction of pictures that show ``label``."""
        return sum(label in found for found in self(images)) / len(images)
