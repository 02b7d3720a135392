"""``recare-patch audit``: any eraser, by the ruler of this package's own patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click import Context, IntRange, argument, command, echo, pass_context

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.cli.measure import attack_options_of, label_option, tell_findings
from recare_patch.core import EvaluationError
from recare_patch.recipe import KINDS


def _place(text: str) -> str:
    """A patch on the Hub is fetched, and one's short name made whole, with the title that stands before it."""
    title, equals, rest = text.rpartition("=")
    if rest.startswith(cli.HUB_PREFIX):
        rest = str(cli.parse_patch(rest)[0])
    return f"{title}{equals}{cli.short_patch(rest)}"


@command()
@argument("erasers", nargs=-1, required=True, type=cli.PLACE, metavar="ERASER...")
@option("--base FOLDER|HUB-ID", "The untouched model that all of them are for.", required=True)
@option("--concept TEXT", "What they claim to have erased.  [default: the suite's, or what a patch among them says]")
@option("--kind NAME", f"{' | '.join(KINDS)}, of a concept without a bundled suite.")
@option(
    "--suite NAME|FILE",
    "Prompts and seeds: a suite, or a table of prompts (.csv).  [default: the concept's own, else one from its name]",
)
@option("--metric NAME", "{names}; repeatable.  [default: all that need no training]", into="metrics",
        cls=cli.NamesOption, table="METRICS")  # fmt: skip
@option("--attack NAME", "{names}; repeatable.", into="attacks", cls=cli.NamesOption, table="ATTACKS")
@option("--budget NAME", "Of the attacks: small (minutes on a CPU) or published.", None, "small")
@cli.set_option("any option of the chosen attacks, such as pictures=12")
@option("--check NAME", "{names}; repeatable.", into="checks", cls=cli.NamesOption, table="CHECKS", extra=("all",))
@option("--pictures", "Of each figure.  [default: 200; with --verify as many as were recorded]", IntRange(1, 1000000))
@option("--out DIR", "A folder with a folder for each, audit.json and audit.html.", cli.FOLDER, Path("audit"))
@option("--cache FOLDER", "Where pictures are kept.  [default: the user's cache folder]", cli.FOLDER)
@flag("--no-cache", "Keep no pictures.")
@option("--detector NAME[:FOLDER]", "Who judges the pictures.  [default: as the suite]")
@label_option
@cli.clip_option
@option("--seed", "First seed.  [default: the suite's]", cli.SEED)
@option("--batch-size", "Pictures drawn together.  [default: by the base]", IntRange(1, 1024))
@flag("--verify", "Measure again what --out holds, and say whether it holds.", "again")
@cli.json_option
@cli.device_option
@cli.drawing_options
@pass_context
def audit(
    ctx: Context,
    /,
    erasers: tuple[str, ...],
    attacks: tuple[str, ...],
    assignments: tuple[str, ...],
    cache: Path | None,
    no_cache: bool,
    again: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what anybody says has erased a concept, beside its base: one table with intervals.

    \b
    recare-patch audit leco.safetensors --base atelier --concept "Van Gogh"
    recare-patch audit esd=esd-unet.safetensors adv/text_encoder van-gogh-patch --base atelier
    recare-patch audit defence:safree some/pipeline --base some/base --concept nudity --attack p4d

    An ERASER is a LoRA (diffusers, PEFT, kohya), weights of a denoiser or text encoder as a file or folder, whole or
    with the changed tensors alone, a pipeline, a patch, or the defence that an installed package brings. TITLE=ERASER
    gives it another name. With --verify the exit code is 1 where a figure does not hold.
    """
    if no_cache and cache is not None:
        raise EvaluationError("--no-cache and --cache exclude each other")
    from recare_patch.measure import audit as auditing

    erasers = tuple(map(_place, erasers))
    pictures = options.pop("pictures")
    with cli.shown_progress() as progress:
        shared: dict[str, Any] = {"progress": progress, "memory": cli.given_memory()}
        if again:
            kept = ("base", "out", "clip", "precision", "vram", "device")
            known: dict[str, Any] = {name: options[name] for name in kept}
            findings = auditing.verify_audit(erasers, pictures=pictures, cache=cache, **known, **shared)
        else:
            chosen = attack_options_of(attacks, options["budget"], cli.overrides_from(assignments, {}))
            options |= {"metrics": options["metrics"] or None, "pictures": pictures or 200}
            found = auditing.audit(erasers, attacks=chosen, cache=False if no_cache else cache, **options, **shared)
    if again:
        ctx.exit(tell_findings(findings, str(options["out"]), as_json))
    if as_json:
        echo(auditing.audit_text(found), nl=False)
        return
    cli.echo_table(auditing.table(found))
    echo(f"Audit: {found.folder / auditing.AUDIT_NAME}")
    echo(f"Page: {found.folder / auditing.PAGE_NAME}")
