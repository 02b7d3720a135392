"""A defence at sampling time, in the form that `recare-patch audit` takes from an installed package.

    python examples/defence.py --concept "Van Gogh" --out defended.png

It takes the directions in which the concept's name moves a prompt's embedding out of whatever the denoiser reads: the
projection of SAFREE (Yoon et al., arXiv 2410.12761), without its choice of tokens and of steps. No weight changes.
A package of your own names it in its pyproject.toml, and then it is audited as anything else:

    [project.entry-points."recare_patch.defences"]
    project-out = "your_package.defence:project_out"

    recare-patch audit defence:project-out:directions=4 --base atelier --concept "Van Gogh"
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from recare_patch import Concept, load_base
from recare_patch.core import SheetRow, save_sheet, sheet


@contextlib.contextmanager
def project_out(pipeline: Any, concept: Concept, directions: int = 2) -> Iterator[None]:
    """While it is on, the denoiser hears nothing along the first directions of the concept's own prompts."""

    def states(texts: list[str]) -> torch.Tensor:
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with torch.no_grad():
            return pipeline.encode_prompt(texts, device=pipeline.unet.device, **options)[0]

    empty = states([""])
    moved = (states(list(concept.bare_names)) - empty).flatten(0, 1).float()
    basis = torch.linalg.svd(moved, full_matrices=False).Vh[:directions]

    def hook(unet: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        read = kwargs.get("encoder_hidden_states")
        if read is None:
            return args, kwargs
        away = (read - empty.to(read)).float()
        away = away - away @ basis.T.to(away) @ basis.to(away)
        return args, {**kwargs, "encoder_hidden_states": (empty.to(away) + away).to(read.dtype)}

    handle = pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def main() -> None:
    """Draw with and without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="Van Gogh")
    parser.add_argument("--kind", default="style")
    parser.add_argument("--base", default="atelier")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="defended.png")
    arguments = parser.parse_args()

    base = load_base(arguments.base)
    concept = Concept(text=arguments.concept, kind=arguments.kind)
    prompts, seeds = [concept.target_prompt, "A painting of a house"], [0, 1]
    rows = [SheetRow("as it is", base.generate(prompts, seeds, steps=arguments.steps))]
    with project_out(base.pipeline, concept):
        rows.append(SheetRow("defended", base.generate(prompts, seeds, steps=arguments.steps)))
    save_sheet(sheet(rows, prompts, "A defence at sampling time"), arguments.out)
    print(f"sheet: {arguments.out}")


if __name__ == "__main__":
    main()
