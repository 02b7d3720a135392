"""The text of a card, from what a patch says of itself and what its run recorded."""

from __future__ import annotations

import importlib.metadata
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from recare_patch.core import PatchError
from recare_patch.patch.front_matter import front_matter, hub_id, sample_prompt
from recare_patch.patch.markdown import plain, yaml_text
from recare_patch.patch.metadata import PatchMetadata
from recare_patch.patch.patch import concept_name
from recare_patch.recipe import METHODS, WEIGHTS_NAME, method_info

UNMEASURED = (
    "Made for the base named above. On fine-tunes of it, and at scales other than 1, nothing was measured."
)
MEASURED = "Made for the base named above. What was measured away from it is told under Evidence."

PLACE = "path/to/this/folder"
"""Where the reader has the patch, as long as it is not published."""

_ATELIER = "atelier"


class _Paper:
    """A method's paper: how a reader finds it, and how an author cites it."""

    def __init__(self, name: str, authors: str, venue: str, arxiv: str, bibtex: Mapping[str, str]) -> None:
        self.key, self.bibtex = name.casefold(), bibtex
        self.url = f"https://arxiv.org/abs/{arxiv}"
        self.line = f"[{name}]({self.url}) ({authors}, {venue})"
        self.arxiv = arxiv

    def entry(self) -> list[str]:
        """Its lines in BibTeX."""
        fields = {**self.bibtex, "eprint": self.arxiv, "archiveprefix": "arXiv"}
        kind = "inproceedings" if "booktitle" in fields else "misc"
        lines = [f"  {key} = {{{value}}}," for key, value in fields.items()]
        return [f"@{kind}{{{self.key}{fields['year']},", *lines, "}"]


_PAPERS = {
    "recare": _Paper(
        "ReCARE",
        "Kim et al.",
        "ICLR 2026",
        "2606.24192",
        {
            "author": "Kim and others",
            "title": "{ReCARE}",
            "booktitle": "International Conference on Learning Representations",
            "year": "2026",
        },
    ),
    "esd": _Paper(
        "ESD",
        "Gandikota et al.",
        "ICCV 2023",
        "2303.07345",
        {
            "author": "Gandikota, Rohit and Materzy{\\'n}ska, Joanna and Fiotto-Kaufman, Jaden "
            "and Bau, David",
            "title": "Erasing Concepts from Diffusion Models",
            "booktitle": "IEEE/CVF International Conference on Computer Vision",
            "year": "2023",
        },
    ),
    "s-grace": _Paper(
        "S-GRACE",
        "Yin et al.",
        "2025",
        "2510.27285",
        {"author": "Yin and others", "title": "{S-GRACE}", "year": "2025"},
    ),
    "forget-me-not": _Paper(
        "Forget-Me-Not",
        "Zhang et al.",
        "2023",
        "2303.17591",
        {
            "author": "Zhang, Gong and Wang, Kai and Xu, Xingqian and Wang, Zhangyang and Shi, Humphrey",
            "title": "{Forget-Me-Not}: Learning to Forget in Text-to-Image Diffusion Models",
            "year": "2023",
        },
    ),
    "uce": _Paper(
        "UCE",
        "Gandikota et al.",
        "WACV 2024",
        "2308.14761",
        {
            "author": "Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzy{\\'n}ska, Joanna "
            "and Bau, David",
            "title": "Unified Concept Editing in Diffusion Models",
            "booktitle": "IEEE/CVF Winter Conference on Applications of Computer Vision",
            "year": "2024",
        },
    ),
    "regmean": _Paper(
        "RegMean",
        "Jin et al.",
        "ICLR 2023",
        "2212.09849",
        {
            "author": "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
            "title": "Dataless Knowledge Fusion by Merging Weights of Language Models",
            "booktitle": "International Conference on Learning Representations",
            "year": "2023",
        },
    ),
    "ties": _Paper(
        "TIES",
        "Yadav et al.",
        "NeurIPS 2023",
        "2306.01708",
        {
            "author": "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
            "title": "{TIES}-Merging: Resolving Interference When Merging Models",
            "booktitle": "Advances in Neural Information Processing Systems",
            "year": "2023",
        },
    ),
    "dare": _Paper(
        "DARE",
        "Yu et al.",
        "ICML 2024",
        "2311.03099",
        {
            "author": "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin",
            "title": "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
            "Free Lunch",
            "booktitle": "International Conference on Machine Learning",
            "year": "2024",
        },
    ),
}
"""By method, of erasing and of stacking."""

_LORA_PAPER = "[LoRA](https://arxiv.org/abs/2106.09685) (Hu et al., ICLR 2022)"


def template(name: str) -> Template:
    """A page's template: inside an installed package, beside it in a source checkout.

    Raises:
        PatchError: it is missing.
    """
    package = Path(__file__).parent.parent
    inside = package / "_hub" / name
    file = inside if inside.is_file() else package.parent / "hub" / name
    try:
        return Template(file.read_text(encoding="utf-8"))
    except OSError as fault:
        raise PatchError(f"the template {name} is not in this installation; reinstall the package") from fault


def card_text(
    metadata: PatchMetadata | None, training: Mapping[str, Any], *, previews: Sequence[str] = ("preview.png",)
) -> str:
    """A model card as the Hub reads it: YAML front matter, then Markdown.

    Args:
        metadata: of the patch, single or a stack.
        training: what the run's ``training.json`` holds: ``seconds``, ``denoiser_evaluations``,
            ``peak_memory_bytes``, ``device``, ``stages`` and ``warnings``; what is missing is left out.
        previews: pictures beside the card; the first is shown at its top.

    Returns:
        The text; it calls the patch's folder :data:`PLACE`.

    Raises:
        PatchError: the patch has no metadata, or the template is missing.
        ConceptError: what it erases is no concept.
    """
    if metadata is None:
        raise PatchError("a card needs a patch made by recare-patch, and this LoRA carries no such metadata")
    picture = f"![Before and after, at the same seeds]({previews[0]})\n\n" if previews else ""
    return template("card_template.md").substitute(
        front_matter=yaml_text(front_matter(metadata, previews)),
        title=f"{plain(metadata.concept)}, erased from {plain(metadata.base)}",
        summary=_summary(metadata),
        preview=picture,
        erased=_erased(metadata),
        care_set=_care_set(metadata),
        diffusers_code=_diffusers_code(metadata),
        other_tools=_other_tools(metadata),
        project_url=_project_url(),
        command_line=f"recare-patch generate --patch {PLACE} --prompt {shlex.quote(_prompt(metadata))}",
        scale=_scale(metadata),
        made=_made(metadata),
        settings=_settings(metadata),
        cost=_cost(training),
        limits=_limits(metadata, training),
        licence=_licence(metadata),
        citation=_citation(metadata),
    )


def _project_url() -> str:
    try:
        urls = importlib.metadata.metadata("recare-patch").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    # Without a home of its own the project is best explained by its method's paper.
    return urls[0].split(",", 1)[1].strip() if urls else _PAPERS["recare"].url


def _prompt(metadata: PatchMetadata) -> str:
    return sample_prompt(metadata) or "a prompt of yours"


def _summary(metadata: PatchMetadata) -> str:
    base = plain(metadata.base)
    if metadata.parts is not None:
        names = ", ".join(f"**{plain(part.name)}**" for part in metadata.parts)
        return (
            f"{len(metadata.parts)} patches in one LoRA of rank {metadata.rank}: it makes {base} forget "
            f"{names}. It is loaded like any other LoRA and taken out again."
        )
    told = [f"**{plain(one.concept)}**" + (f" ({one.kind})" if one.kind else "") for one in metadata.erased]
    return (
        f"A LoRA of rank {metadata.rank} that makes {base} forget {' and '.join(told)}. "
        "It is loaded like any other LoRA and taken out again."
    )


def _erased(metadata: PatchMetadata) -> str:
    if metadata.parts is not None:
        rows = [
            f"| {plain(part.name)} | {part.scale:g} | `{plain(part.sha256)}` |" for part in metadata.parts
        ]
        return "\n".join(["| part | scale | SHA-256 of its weights |", "|---|---:|---|", *rows])
    told = []
    for concept in (one.as_concept() for one in metadata.erased if one.kind is not None):
        prompts = ", ".join(f"“{plain(prompt)}”" for prompt in concept.name_prompts)
        told.append(f"Erased: prompts that name {plain(concept.text)}, such as {prompts}.")
    return "\n\n".join(told)


def _care_set(metadata: PatchMetadata) -> str:
    words = dict.fromkeys(word for one in metadata.erased for word in one.care_words)
    if metadata.stacking is not None:
        how = metadata.stacking
        exact = {
            "concat": "exactly what the parts do together",
            "regmean": "each part as it is on what it erases, and as little as possible elsewhere",
        }.get(how.method, "an approximation")
        text = (
            f"Stacked by `{plain(how.method)}`, {exact}: its update differs from the sum of the parts' by "
            f"{how.relative_error:.2g} of that sum's norm."
        )
        return f"{text}\n\nGuarded by its parts: {', '.join(map(plain, words))}." if words else text
    if not words:
        return "Guarded: nothing by name; this method has no CARE-set."
    return (
        f"Guarded, because they go along with it in pictures (its CARE-set, {len(words)} in all): "
        f"{', '.join(plain(word) for word in words)}."
    )


def _diffusers_code(metadata: PatchMetadata) -> str:
    if hub_id(metadata.base):
        base, note = metadata.base, ""
    elif metadata.base == _ATELIER:
        base, note = "path/to/atelier/pipeline", "  # `recare-patch atelier info` prints it"
    else:
        base, note = f"path/to/{metadata.base}", ""
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({base!r}){note}",
            f'pipe.load_lora_weights("{PLACE}", weight_name="{WEIGHTS_NAME}", adapter_name="erased")',
            'pipe.set_adapters("erased", 1.0)',
            f"image = pipe({_prompt(metadata)!r}).images[0]",
        ]
    )


def _other_tools(metadata: PatchMetadata) -> str:
    name = concept_name(metadata.concept)
    if metadata.base_text_encoders_sha256:
        clip = "`strength_clip` at 1 as well, since it changes the text encoder too"
    else:
        clip = "`strength_clip` has no effect, since it leaves the text encoder alone"
    lines = [
        f"The same patch in kohya's shape is `{name}.safetensors`; where it is missing, "
        f"`recare-patch convert {WEIGHTS_NAME} --to kohya --out .` makes it.",
        "",
        f"- A1111: put it into `models/Lora` and write `<lora:{name}:1>` into the prompt.",
        "- ComfyUI: put it into `models/loras`, and a *Load LoRA* node between checkpoint and sampler, "
        f"`strength_model` at 1; {clip}.",
    ]
    if metadata.base == _ATELIER:
        lines += [
            "",
            "Neither was tried with Atelier, which has sizes of its own: here the file is an example.",
        ]
    return "\n".join(lines)


def _scale(metadata: PatchMetadata) -> str:
    if metadata.parts is None:
        made = "It was trained for scale 1."
    else:
        made = "Load it at scale 1: the scales of its parts are in the tensors."
    return (
        f"{made} Below 1 it erases less, and at 0 the base is as it was. Above 1 it changes more than it was "
        "made to. A scale below 0 turns it round, towards the concept. Where the scales were measured, the "
        "table is under Evidence."
    )


def _made(metadata: PatchMetadata) -> str:
    if metadata.parts is not None:
        return "By `recare-patch stack`, of the parts above; each carries its own recipe."
    return (
        "The file carries its whole recipe, so one command makes it again:\n\n"
        f"```bash\nrecare-patch erase --recipe {WEIGHTS_NAME} --out again\n```"
    )


def _settings(metadata: PatchMetadata) -> str:
    rows = {
        "method": metadata.method,
        "base": f"{plain(metadata.base)} ({metadata.prediction_type})",
        "base denoiser, SHA-256": f"`{metadata.base_denoiser_sha256}`",
        "layers": metadata.layers,
        "rank, alpha": f"{metadata.rank}, {metadata.alpha:g} (in the tensors: load at scale 1)",
    }
    if metadata.recipe is not None:
        recipe = metadata.parsed_recipe
        searched = metadata.method == "recare" and recipe.search.rounds
        rows |= {
            "target images": f"{recipe.target_images.count}, {recipe.target_images.steps} steps, "
            f"guidance {recipe.target_images.guidance_scale:g}",
            "search": f"{recipe.search.rounds} rounds of {recipe.search.erase_steps} erasing and "
            f"{recipe.search.inversion_steps} inversion steps"
            if searched
            else "none",
            "erasing": f"{recipe.erase.steps} steps of {recipe.erase.batch_size}, {recipe.erase.optimizer}, "
            f"learning rate {recipe.erase.learning_rate:g}, states from {recipe.erase.states}",
            "seed": str(metadata.seed),
        }
    rows["versions"] = ", ".join(f"{package} {version}" for package, version in metadata.versions.items())
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _number(value: Any) -> float | None:
    """A finite number, or ``None``: records are files that anyone may have edited."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _cost(training: Mapping[str, Any]) -> str:
    seconds, evaluations, memory = (
        _number(training.get(key)) for key in ("seconds", "denoiser_evaluations", "peak_memory_bytes")
    )
    facts = []
    if seconds is not None:
        facts.append(f"{seconds:,.0f} seconds")
    if evaluations is not None:
        facts.append(f"{evaluations:,.0f} denoiser evaluations")
    if memory:
        facts.append(f"{memory / 2**30:.1f} GiB of memory at most")
    sentence = f"{', '.join(facts)}" if facts else "Not recorded"
    device = f", on {plain(str(training['device']))}" if training.get("device") else ""
    text = (
        f"{sentence}{device}. An evaluation is one sample through the denoiser; "
        "a training sample counts as 3."
    )
    stages = training.get("stages")
    rows = [
        f"| {plain(str(name))} | {_number(one.get('seconds')) or 0:,.1f} | "
        f"{_number(one.get('evaluations')) or 0:,.0f} |"
        for name, one in (stages.items() if isinstance(stages, Mapping) else ())
        if isinstance(one, Mapping)
    ]
    if not rows:
        return text
    return "\n".join([text, "", "| stage | seconds | evaluations |", "|---|---:|---:|", *rows])


def _limits(metadata: PatchMetadata, training: Mapping[str, Any]) -> str:
    points = [
        "**A patch that is loaded can be left out, taken out or turned round** (a negative scale) by whoever "
        "runs the model; whoever has the base has the concept. Where that matters, give away a base with the "
        "patch in its weights instead: `recare-patch merge` writes one. That too can be fine-tuned back, or "
        "undone by whoever has this file.",
        "Erasing makes a concept hard to reach, not impossible: a prompt, a picture or a fine-tuning that "
        "nobody tried may bring it back.",
        UNMEASURED,
    ]
    if metadata.parts is not None:
        points.append(
            "What was measured on a part alone does not speak for the stack. Evidence on the stack, where "
            "there is some, lies in a folder for each concept."
        )
    elif metadata.by_concept:
        points.append("Evidence, where there is some, lies in a folder for each concept.")
    if metadata.method == "esd":
        points.append("ESD guards nothing: what goes along with the concept may fade with it.")
    elif metadata.method in METHODS and metadata.method != "recare":
        info = method_info(metadata.method)
        points.append(f"{info.title}: {info.weakness}.")
    if (residual := _number(training.get("rank_residual"))) is not None:
        points.append(
            f"The patch has rank {metadata.rank}, which leaves out {residual:.2g} of the norm of the update "
            "that was computed."
        )
    if any(one.kind == "nsfw" for one in metadata.erased):
        points.append("It is no safety filter: it knows nothing but what it was trained on.")
    warnings = training.get("warnings")
    points += [plain(str(one)) for one in (warnings if isinstance(warnings, list) else ())]
    return "\n".join(f"- {point}" for point in points)


def _licence(metadata: PatchMetadata) -> str:
    return (
        "A patch changes its base's weights and follows their licence. The one in this card's header is that "
        f"of {plain(metadata.base)}, as far as it is known, unless its owner has chosen another."
    )


def _citation(metadata: PatchMetadata) -> str:
    methods = [one.method for one in metadata.erased]
    methods.append(metadata.stacking.method if metadata.stacking is not None else metadata.method)
    papers = [_PAPERS[one] for one in dict.fromkeys(methods) if one in _PAPERS]
    lines = [*(f"- {paper.line}" for paper in papers), f"- {_LORA_PAPER}"]
    if papers:
        lines += ["", "```bibtex", *(line for paper in papers for line in paper.entry()), "```"]
    return "\n".join(lines)
