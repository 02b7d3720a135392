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
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import read_tensors
from recare_patch.models.atelier import JUDGE
from recare_patch.models.atelier.labels import ATELIER, SIZE, Labels

THINGS = ATELIER.things
LABELS = ATELIER.names


class JudgeNetwork(nn.Module):
    """Convolutions over ``[batch, 3, 64, 64]`` pictures in ``[-1, 1]``; one logit a label."""

    def __init__(self, width: int = 32, labels: Labels = ATELIER) -> None:
        super().__init__()
        self.labels = labels
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 4 * width):
            for taken, stride in ((channels, 1), (out, 2)):
                convolution = nn.Conv2d(taken, out, 3, padding=1, stride=stride, bias=False)
                layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        # Two poolings: where a thing is small, the maximum sees it; a style is seen by the mean.
        self.head = nn.Linear(2 * channels, len(labels.names))

    def forward(self, pixels: Tensor) -> Tensor:
        """One logit for each of the labels' names, ``[batch, names]``."""
        maps = self.features(pixels)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))


def targets(found: Sequence[frozenset[str]], labels: Labels = ATELIER) -> Tensor:
    """Label sets as a 0/1 matrix ``[batch, names]`` in the order of the labels' names."""
    return torch.tensor([[float(name in shown) for name in labels.names] for shown in found])


def judge_loss(logits: Tensor, wanted: Tensor, labels: Labels = ATELIER) -> Tensor:
    """Cross-entropy for style, time and ground; binary cross-entropy for each thing."""
    parts, truth = logits.split(labels.sizes, dim=1), wanted.split(labels.sizes, dim=1)
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
    def load(cls, path: Path | None = None, labels: Labels = ATELIER) -> Judge:
        """The bundled judge, or the one in a ``judge.safetensors`` file, with the labels that it was trained on."""
        path = path or JUDGE
        network = JudgeNetwork(labels=labels)
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path).items()})
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image] | np.ndarray) -> list[frozenset[str]]:
        """The labels of each picture: one style, time and ground, and every thing present."""
        labels = self.network.labels
        found: list[frozenset[str]] = []
        for start in range(0, len(images), 128):
            logits = self.network(to_pixels(images[start : start + 128]))
            *groups, things = logits.split(labels.sizes, dim=1)
            for row in range(len(logits)):
                present = {name for name, logit in zip(labels.things, things[row], strict=True) if logit > 0}
                for words, group in zip((labels.styles, labels.times, labels.grounds), groups, strict=True):
                    present.add(words[int(group[row].argmax())])
                found.append(labels.complete(present))
        return found

    def rate(self, images: Sequence[Image.Image] | np.ndarray, label: str) -> float:
        """The fraction of pictures that show ``label``."""
        return sum(label in found for found in self(images)) / len(images)
