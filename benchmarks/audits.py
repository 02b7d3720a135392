"""Audits on Atelier: erasers that are no patches of this package, beside one that is; and patches on fine-tunes.

    python -m benchmarks.audits make --work audit-work       # the erasers, in the shapes that releases have
    python -m benchmarks.audits audit --work audit-work      # all of them, and the untouched base, in one table
    python -m benchmarks.audits attack --work audit-work     # the same with concept inversion
    python -m benchmarks.audits transfer --work audit-work   # three patches on two fine-tunes of Atelier
    python -m benchmarks.audits table                        # the results as Markdown

Each stage leaves its JSON in ``benchmarks/results/audits`` and goes on where it was stopped. ESD's weights are a whole
denoiser, UCE's the changed tensors alone, S-GRACE's a text encoder, the closed form's a pipeline, LECO's a LoRA in
kohya's names; they are trained by this package's own methods, which is what an audit must find out without being told.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.erasure import made_before
from recare_patch.core import write_text

RESULTS = Path(__file__).parent / "results" / "audits"
CONCEPT = "Van Gogh"
METHODS: dict[str, dict[str, Any]] = {
    "recare": {},
    "esd": {"method": "esd", "adapter.layers": "attention"},
    "leco": {"method": "esd", "seed": 1},
    "s-grace": {"method": "s-grace"},
    "uce": {"method": "uce"},
    "closed": {"method": "closed"},
}
"""How each is trained; "leco" is ESD's loss on a LoRA, which is LECO's in all but its sampling of states."""

METRICS = ("concept-rate", "care-score", "neighbours", "clip-score")
ATTACK = ("concept-inversion", {"steps": 100, "pictures": 24})
PICTURES = 24
_UNET = Path("unet", "diffusion_pytorch_model.safetensors")


def patch_of(work: Path, name: str) -> Path:
    """The patch of a method, made where it is not there yet."""
    from recare_patch.erasure import erase, resolve_recipe

    out = work / "patches" / name
    recipe = resolve_recipe(CONCEPT, overrides=METHODS[name])
    if not made_before(out, recipe):
        erase(recipe, out, resume=out.exists())
    return out


def merged(work: Path, name: str) -> Path:
    """The bundled pipeline with a method's patch in its weights."""
    from recare_patch.combine import merge
    from recare_patch.patch import Patch

    out = work / "merged" / name
    if not (out / "model_index.json").is_file():
        merge([(Patch.load(patch_of(work, name)), 1.0)], "atelier", out)
    return out


def make(work: Path) -> dict[str, Path]:
    """Title → the eraser, as its release would have it."""
    from recare_patch.models.atelier import PIPELINE
    from recare_patch.patch import Patch, write_kohya

    files = {"ESD": work / "esd-unet.safetensors", "UCE": work / "uce.safetensors", "LECO": work / "leco.safetensors"}
    if not files["ESD"].is_file():
        shutil.copyfile(merged(work, "esd") / _UNET, files["ESD"])
    if not files["UCE"].is_file():
        before, after = load_file(PIPELINE / _UNET), load_file(merged(work, "uce") / _UNET)
        save_file({key: one for key, one in after.items() if not one.equal(before[key])}, files["UCE"])
    if not files["LECO"].is_file():
        # Without what this package says of it: a stranger's LoRA says nothing.
        write_kohya(Patch(Patch.load(patch_of(work, "leco")).tensors), files["LECO"])
    text = work / "text-encoder"
    if not (text / "config.json").is_file():
        shutil.copytree(merged(work, "s-grace") / "text_encoder", text)
    return files | {"S-GRACE": text, "closed form": merged(work, "closed"), "ReCARE": patch_of(work, "recare")}


def audited(work: Path, attacked: bool) -> None:
    """The audit, whose JSON goes into the results without the suite, which is bundled."""
    from examples.defence import project_out
    from recare_patch.measure import attack_options
    from recare_patch.measure.audit import audit, table
    from recare_patch.measure.erasers import Defence
    from recare_patch.measure.finding import Found

    sources: list[Any] = [f"{title}={place}" for title, place in make(work).items()]
    defence = Found("projection", "defence", lambda _, concept: Defence("projection", project_out, concept))
    name, options = ATTACK
    found = audit(
        [*sources, defence, "untouched=atelier"],
        base="atelier",
        concept=CONCEPT,
        out=work / "audit",
        cache=work / "pictures",
        metrics=METRICS,
        pictures=PICTURES,
        attacks={name: attack_options(name, "small", options)} if attacked else {},
        device="cpu",
    )
    write_text(RESULTS / "audit.json", json.dumps(table(found), indent=1, ensure_ascii=False) + "\n")


def transferred(work: Path) -> None:
    """Three patches on the two fine-tunes, which ``benchmarks.atelier train --fine-tune`` makes."""
    from benchmarks.atelier.fine_tuning import FINE_TUNES, fine_tune
    from recare_patch.measure.transfer import table, transfer

    for name in FINE_TUNES:
        if not (work / "tuned" / name / "model_index.json").is_file():
            fine_tune(name, work / "tuned" / name, work / "tuned-work" / name)
    places = ["atelier", *(str(work / "tuned" / name) for name in FINE_TUNES)]
    for name in ("recare", "esd", "closed"):
        found = transfer(
            patch_of(work, name),
            places,
            out=work / "transfer" / name,
            cache=work / "pictures",
            metrics=METRICS,
            pictures=PICTURES,
            device="cpu",
        )
        write_text(RESULTS / f"transfer.{name}.json", json.dumps(table(found), indent=1, ensure_ascii=False) + "\n")


def markdown() -> str:
    """All results, a table each."""
    parts = []
    for file in sorted(RESULTS.glob("*.json")):
        head, *rows = json.loads(file.read_text(encoding="utf-8"))
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
        parts.append(f"{file.stem}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("make", "audit", "attack", "transfer", "table"))
    parser.add_argument("--work", type=Path, default=Path("audit-work"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    if arguments.stage == "make":
        for title, place in make(work).items():
            print(f"{title}: {place}")
    elif arguments.stage in ("audit", "attack"):
        audited(work, arguments.stage == "attack")
    elif arguments.stage == "transfer":
        transferred(work)
    else:
        print(markdown())


if __name__ == "__main__":
    main()
