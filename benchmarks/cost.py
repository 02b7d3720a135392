"""What a run costs: seconds, evaluations and memory by stage, for each base and size of card.

    python -m benchmarks.cost run --base sd-1.5 --vram 6 --device cuda       # one row, the whole procedure
    python -m benchmarks.cost run --base sdxl --cut --size 256x256           # steps cut, smaller pictures
    python -m benchmarks.cost run --base sd-1.5 --cut --paper                # and the published procedure
    python -m benchmarks.cost adam                                           # bytes of optimizer states
    python -m benchmarks.cost all --device cuda                              # every base and card
    python -m benchmarks.cost estimate                                       # what they should take, counted
    python -m benchmarks.cost table                                          # all results as Markdown

``atelier`` is the bundled base; ``sd-1.5``, ``sd-2.1`` and ``sdxl`` have the published sizes and random
weights (:mod:`benchmarks.bases`), so that their pictures are noise and their costs are real. ``--cut``
does one or two of everything; what the whole recipe takes is then counted, and its seconds follow from
those measured for an evaluation. ``--paper`` runs the published procedure in the same process, always cut:
its count follows from its settings (:mod:`benchmarks.paper_procedure`), and its seconds are that count at
its cheapest stage's rate. It trains most of the denoiser, which takes six times its weights. ``estimate``
runs nothing: it counts evaluations and operations and adds up memory as ``recare-patch plan`` does. Each
call leaves one JSON file in ``benchmarks/results/cost``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import paper_procedure
from benchmarks.bases import BASES, make_base, write_configurations
from benchmarks.paper_procedure import PaperSettings, expected_evaluations
from recare_patch.core import write_json
from recare_patch.erasure import resolve_recipe
from recare_patch.models import BaseModel
from recare_patch.recipe import CareSetOptions, MemoryOptions, Recipe

RESULTS = Path(__file__).parent / "results" / "cost"
VRAM = (6, 8, 12, 24)
RECIPES = {
    "atelier": "van-gogh-atelier",
    "sd-1.5": "van-gogh-sd-1.5",
    "sd-2.1": "van-gogh-sd-2.1",
    "sdxl": "van-gogh-sdxl",
}
RANKS = (4, 8)
SPEEDS = (400e12, 20e12)
"""Operations a second that the estimates are told at: some 40 % of what an H100 or H200 multiplies matrices
with in bf16, and a small card."""
PUBLISHED_SECONDS = 30.1 * 60
"""Of the published procedure on an H100, as its authors report it."""

# One or two of everything; the CARE-set is mined as always, but noise has no clusters worth the name.
CUT: dict[str, Any] = {
    "target_images.count": 2,
    "target_images.steps": 1,
    "target_images.batch_size": 1,
    "care_set.clustering": False,
    "care_set.refinement": False,
    "search.rounds": 1,
    "search.erase_steps": 1,
    "search.inversion_steps": 1,
    "search.batch_size": 1,
    "erase.steps": 2,
    "erase.batch_size": 1,
    "erase.retain_batch_size": 1,
    "erase.retained_images": 1,
    "erase.retained_vocabulary": 2,
    "erase.retained_pairs": 0,
    "erase.composed": False,
}


# As often as it takes to have each stage's seconds.
PAPER_CUT = PaperSettings(target_images=10, steps=2, rounds=1, erase_steps=2, inversion_steps=2, final_steps=2)


def _recipe(arguments: argparse.Namespace, folder: Path) -> Recipe:
    """The recipe to run, with what the command line changes."""
    from benchmarks.erasure import assignments

    name = arguments.base
    places = {} if name == "atelier" else {"base": str(folder), "clip": "atelier"}
    recipe = resolve_recipe("", recipe=RECIPES[name], overrides=assignments(arguments.set), **places)
    if arguments.rank:
        recipe = recipe.with_overrides({"adapter.rank": arguments.rank, "adapter.alpha": float(arguments.rank)})
    if arguments.size:
        recipe = recipe.with_overrides({"memory.resolution": arguments.size})
    if arguments.precision:
        recipe = recipe.with_overrides({"precision": arguments.precision})
    if arguments.vram:
        from recare_patch.erasure import choose

        recipe, _ = choose(recipe, arguments.vram)
    return recipe


def run(arguments: argparse.Namespace) -> Path:
    """Measure one row."""
    from recare_patch.careset import Clip
    from recare_patch.erasure import erase, evaluations, measured_speed, plan
    from recare_patch.models import device_name, versions

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / arguments.base
        if arguments.base in BASES:
            write_configurations(arguments.base, folder)
        whole = _recipe(arguments, folder)
        recipe = whole.with_overrides(CUT) if arguments.cut else whole
        device = torch.device(arguments.device)
        speed = measured_speed(device, recipe.precision)
        expected = plan(recipe, speed=speed)
        base = _base(arguments.base, folder, recipe, device)
        out = Path(place) / "patch"
        result = erase(recipe, out, base=base, clip=Clip.load("atelier"), preview=False, device=str(device))
        loads = _loads_in_diffusers(base, out)
        size = (out / "pytorch_lora_weights.safetensors").stat().st_size
        note: dict[str, Any] = {
            "base": arguments.base,
            "card_gb": arguments.vram,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "cut": bool(arguments.cut),
            "precision": recipe.precision,
            "memory": recipe.memory.model_dump(exclude_defaults=True),
            "latent_shape": list(base.latent_shape),
            "rank": recipe.adapter.rank,
            "cost": {key: result.cost[key] for key in ("stages", "seconds", "denoiser_evaluations")},
            "peak_memory_bytes": result.cost["peak_memory_bytes"],
            "patch_bytes": size,
            "loads_in_diffusers": loads,
            "whole_evaluations": evaluations(whole),
            "planned": {
                "peak_memory_bytes": expected.peak,
                "seconds": round(expected.seconds, 1),
                "operations_per_evaluation": expected.footprint.operations,
            },
            "paper_evaluations": expected_evaluations(PaperSettings()),
            "versions": versions(("torch", "diffusers", "peft", "transformers", "bitsandbytes")),
        }
        if arguments.paper:
            # What ours holds would be counted with it.
            del base
            note["paper"] = _paper(arguments.base, folder, recipe, device)
    card = f"{arguments.vram:g}gb" if arguments.vram else "plain"
    kind = "cpu" if device.type == "cpu" else "gpu"
    parts = [arguments.base, card, kind, f"rank{recipe.adapter.rank}", *(["cut"] if arguments.cut else [])]
    file = RESULTS / f"{'.'.join(parts)}.json"
    write_json(file, note)
    print(f"{file.name}: {note['cost']['seconds']} s, {size} bytes", flush=True)
    return file


def _base(name: str, folder: Path, recipe: Recipe, device: torch.device) -> BaseModel:
    from recare_patch.models import load_base

    if name == "atelier":
        return load_base(precision=recipe.precision, device=device, memory=recipe.memory)
    return make_base(name, folder, precision=recipe.precision, device=str(device), memory=recipe.memory)


def _paper(name: str, folder: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The published procedure, cut, on a new base without levers, and what the whole of it would take."""
    from recare_patch.careset import Clip
    from recare_patch.models import forget_peak_memory, peak_memory

    plain = recipe.with_overrides({"memory": MemoryOptions(resolution=recipe.memory.resolution)})
    base = _base(name, folder, plain, device)
    forget_peak_memory(device)
    # Pictures of a random base have no clusters worth the name.
    mining = CareSetOptions(clustering=False, refinement=False)
    done = paper_procedure.run(base, recipe.concept, Clip.load("atelier"), PAPER_CUT, mining=mining)
    whole = expected_evaluations(PaperSettings())
    return {
        "seconds": done.seconds,
        "evaluations": done.evaluations,
        "peak_memory_bytes": peak_memory(device),
        # A short rollout bears more of what surrounds it: the cheapest stage's evaluations stand for all.
        "whole_seconds": whole["all"]
        * min(done.seconds[stage] / count for stage, count in done.evaluations.items() if count),
    }


@torch.no_grad()
def _loads_in_diffusers(base: Any, folder: Path) -> bool:
    """Whether diffusers' own loader takes the patch, and the base then predicts otherwise."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 16, 16), generator=generator)
    embeds, at = base.encode_prompts(["A painting in the style of Van Gogh"]), torch.tensor([500])
    before = base.denoise(latents, at, embeds)
    base.pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    after = base.denoise(latents, at, embeds)
    base.pipeline.unload_lora_weights()
    return bool(torch.isfinite(after).all() and not torch.equal(before, after))


def adam(arguments: argparse.Namespace) -> Path:
    """Measure the bytes of both optimizers' states after a step, at each base's size and rank."""
    from recare_patch.erasure import OPTIMIZERS
    from recare_patch.models import find_layout, phantom
    from recare_patch.models import lora as adapters

    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in RECIPES:
            source = "atelier" if name == "atelier" else write_configurations(name, Path(place) / name)
            layout, _ = find_layout(source, weights=False)
            for rank in RANKS:
                shapes = [
                    parameter.shape
                    for parameter in adapters.attach(
                        phantom(layout, "fp32").denoiser,
                        layers="cross-attention",
                        rank=rank,
                        alpha=float(rank),
                        generator=torch.Generator(),
                    )
                ]
                row = {"base": name, "rank": rank, "parameters": sum(shape.numel() for shape in shapes)}
                for optimizer in ("adamw", "adamw8bit"):
                    row[optimizer] = _state_bytes(shapes, OPTIMIZERS.get(optimizer), arguments.device)
                # bitsandbytes keeps 32 bits for tensors of fewer values.
                row["tensors"] = len(shapes)
                row["tensors_in_8_bits"] = sum(shape.numel() >= 4096 for shape in shapes)
                rows.append(row)
                print(row, flush=True)
    file = RESULTS / "adam.json"
    write_json(file, {"device": arguments.device, "rows": rows})
    return file


def _state_bytes(shapes: list[torch.Size], make: Any, device: str) -> int:
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = make(parameters, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                # The table of 8-bit values is shared by all.
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


def every(arguments: argparse.Namespace) -> None:
    """Each base without levers and for each card, one after the other; what is there is left."""
    for name in RECIPES:
        for vram in (None, *VRAM):
            arguments.base, arguments.vram, arguments.paper = name, vram, vram is None
            try:
                run(arguments)
            except (RuntimeError, ValueError) as fault:
                # A card that is too small for the plain run does not end the table.
                print(f"{name}, {vram or 'no'} GB: {str(fault).splitlines()[0]}", flush=True)


def estimate(arguments: argparse.Namespace) -> Path:
    """Count what every base and card should take, by the plan of a run; nothing is run."""
    from recare_patch.core import RecipeError
    from recare_patch.erasure import choose, plan

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for name in BASES:
            folder = write_configurations(name, Path(place) / name)
            for preset in (None, "quick"):
                half = {} if name == "atelier" else {"precision": "bf16"}
                recipe = resolve_recipe(
                    "", recipe=RECIPES[name], base=str(folder), preset=preset, overrides=half, device="cpu"
                )
                for vram in (None, *VRAM):
                    row: dict[str, Any] = {"base": name, "preset": preset, "card_gb": vram}
                    try:
                        chosen, found = choose(recipe, vram) if vram else (recipe, None)
                        planned = plan(chosen, speed=1.0, footprint=found)
                    except RecipeError as fault:
                        row["fault"] = str(fault)
                    else:
                        row |= {
                            "precision": chosen.precision,
                            "levers": chosen.memory.in_words(),
                            "peak_memory_bytes": planned.peak,
                            "evaluations": sum(stage.evaluations for stage in planned.stages),
                            "operations_per_evaluation": planned.footprint.operations,
                            # At a speed of one operation a second; repeated forward passes are in it.
                            "operations": planned.seconds,
                        }
                    rows.append(row)
                    print(row, flush=True)
    file = RESULTS / "estimate.json"
    write_json(file, {"rows": rows})
    return file


def _estimated() -> list[str]:
    """The estimates as Markdown."""
    file = RESULTS / "estimate.json"
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    paper = expected_evaluations(PaperSettings())["all"]
    speeds = [f"s at {speed / 1e12:.0f} TFLOP/s" for speed in SPEEDS]
    slow = PUBLISHED_SECONDS / paper
    heads = ["base", "card", "run", "levers", "peak GB", "evaluations", "10¹⁵ operations", *speeds]
    heads.append(f"s at {1e3 * slow:.0f} ms an evaluation")
    lines = ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for base in BASES:
        own = [row for row in rows if row["base"] == base]
        for row in sorted(own, key=lambda row: (row["card_gb"] or 0, row["preset"] or "")):
            cells = [base, f"{row['card_gb'] or '–'}", row["preset"] or "recipe"]
            if "fault" in row:
                cells += ["does not fit", *["–"] * (len(heads) - 4)]
            else:
                cells += [
                    f"{row['precision']}, {row['levers']}",
                    f"{row['peak_memory_bytes'] / 1e9:.2f}",
                    f"{row['evaluations']:,}",
                    f"{row['operations'] / 1e15:,.1f}",
                    *(f"{row['operations'] / speed:,.0f}" for speed in SPEEDS),
                    f"{row['evaluations'] * slow:,.0f}" if base == "sd-1.5" else "–",
                ]
            lines.append(f"| {' | '.join(cells)} |")
        each = next(row["operations_per_evaluation"] for row in own if "fault" not in row)
        cells = [base, "–", "the paper's, counted", "–", "–", f"{paper:,.0f}", f"{paper * each / 1e15:,.1f}"]
        cells += [f"{paper * each / speed:,.0f}" for speed in SPEEDS]
        cells.append(f"{PUBLISHED_SECONDS:,.0f}" if base == "sd-1.5" else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _rows_of(row: dict[str, Any]) -> list[str]:
    """A result as rows of the table: ours, and the published procedure under it."""
    cost, scale = row["cost"], 4 if row["base"] == "atelier" else 8
    done = cost["denoiser_evaluations"]
    each = sum(one["seconds"] for one in cost["stages"].values() if one["evaluations"]) / max(1, done)
    counted, published = sum(row["whole_evaluations"].values()), row["paper_evaluations"]["all"]
    seconds = counted * each if row["cut"] else cost["seconds"]
    height, width = (scale * side for side in row["latent_shape"][1:])
    place = f"{row['device']} | {width}x{height}"
    levers = MemoryOptions(**{k: v for k, v in row["memory"].items() if k != "resolution"}).in_words()
    rows = [
        f"{row['base']} | {row['card_gb'] or '–'} | ours, {row['precision']}, {levers} | {place} "
        f"| {done:,}{' (cut)' if row['cut'] else ''} | {cost['seconds']:,.0f} "
        f"| {_gib(row['peak_memory_bytes'])} ({_gib(row['planned']['peak_memory_bytes'])}) "
        f"| {row['patch_bytes'] / 1e6:.2f} MB, rank {row['rank']} | {counted:,} | {seconds:,.0f}"
    ]
    if "paper" in row:
        own = row["paper"]
        rows.append(
            f"{row['base']} | – | the paper's, {row['precision']} | {place} "
            f"| {sum(own['evaluations'].values()):,} (cut) | {sum(own['seconds'].values()):,.0f} "
            f"| {_gib(own['peak_memory_bytes'])} | – | {published:,.0f} | {own['whole_seconds']:,.0f}"
        )
    elif row["card_gb"] is None:
        # Not run beside this one: what it counts, at the seconds of our evaluations.
        rows.append(
            f"{row['base']} | – | the paper's, counted | {place} | – | – | – | – | {published:,.0f} "
            f"| {published * each:,.0f}"
        )
    return [f"| {one} |" for one in rows]


def table(arguments: argparse.Namespace) -> str:
    """All results as Markdown."""
    lines = [
        "| base | card | procedure | device | pictures | evaluations | seconds | peak GiB (planned) | patch "
        "| whole: evaluations | whole: seconds |",
        "|---" * 11 + "|",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        if "cost" not in row:
            continue
        lines += _rows_of(row)
    file = RESULTS / "adam.json"
    if file.is_file():
        lines += [
            "",
            "| base | rank | parameters | tensors in 8 bits | AdamW states | 8-bit AdamW states | saved |",
            "|---" * 7 + "|",
        ]
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            lines.append(
                f"| {row['base']} | {row['rank']} | {row['parameters']:,} | {row['tensors_in_8_bits']} of "
                f"{row['tensors']} | {row['adamw'] / 2**20:.2f} MiB | {row['adamw8bit'] / 2**20:.2f} MiB "
                f"| {(row['adamw'] - row['adamw8bit']) / 2**20:.2f} MiB |"
            )
    return "\n".join([*lines, *_estimated()])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "adam", "all", "estimate", "table"])
    parser.add_argument("--base", choices=list(RECIPES), default="atelier")
    parser.add_argument("--vram", type=float, choices=VRAM, help="choose levers for a card of this size")
    parser.add_argument("--cut", action="store_true", help="one or two of everything")
    parser.add_argument("--paper", action="store_true", help="the published procedure beside it, cut")
    parser.add_argument("--size", metavar="WxH", help="smaller pictures than the base's own")
    parser.add_argument("--rank", type=int, help="of the LoRA; the recipe's by default")
    parser.add_argument("--precision", help="of the base; the recipe's by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(arguments))
        return
    {"run": run, "adam": adam, "all": every, "estimate": estimate}[arguments.action](arguments)


if __name__ == "__main__":
    main()
