"""A patch's card: what can be said without evidence, and the header by which the Hub finds it."""

from __future__ import annotations

import functools
import html
import importlib.metadata
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from recare_patch.core import EvidenceError, PatchError, load_yaml, printable
from recare_patch.patch.metadata import PatchMetadata, finite, spent
from recare_patch.patch.patch import concept_name
from recare_patch.recipe import KINDS, METHODS, WEIGHTS_NAME, Paper, method_info, slug_of

TAG = "recare-patch"
"""The tag of every patch that this package makes."""

UNSAFE_TAG = "not-for-all-audiences"

UNMEASURED = "Made for the base named above. On fine-tunes of it, and at scales other than 1, nothing was measured."
MEASURED = "Made for the base named above. What was measured away from it is told under Evidence."

PLACE = "path/to/this/folder"
"""Where the reader has the patch, as long as it is not published."""

_FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", re.ASCII)


def plain(text: str) -> str:
    """Text of a user's that a card may show: no HTML, no Markdown, one line."""
    shown = html.escape(printable(" ".join(text.split())), quote=False)
    # Bare addresses become links by themselves; a colon and a dot as entities do not.
    shown = re.sub(r"(?i)\b(https?|ftp|mailto):", r"\1&#58;", shown)
    shown = re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", shown)
    return re.sub(r"([\\`*_\[\]|]|(?<!&)#)", r"\\\1", shown)


def code(text: str) -> str:
    """A hash or a name inside of backticks, where Markdown has no escaping: letters, digits and ``._-`` alone."""
    return re.sub(r"[^\w.-]+", "?", text)[:100]


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """A card's front matter, empty where there is none, and everything after it.

    Raises:
        EvidenceError: the front matter is not a YAML mapping.
    """
    text = card.replace("\r\n", "\n").removeprefix("\ufeff")
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    where = "the card's front matter, between its --- lines,"
    try:
        # The Hub's own reader takes any YAML; this one is made for files of strangers.
        front = load_yaml(match[1] or "")
    except yaml.YAMLError:
        raise EvidenceError(f"{where} is not readable YAML") from None
    if not isinstance(front, dict | None):
        raise EvidenceError(f"{where} is not a mapping of keys to values")
    return front or {}, text[match.end() :]


def join_card(front: Mapping[str, Any], body: str) -> str:
    """The whole text of a card; comments that its front matter once had are lost."""
    return f"---\n{yaml_text(front)}\n---\n{body.rstrip()}\n"


def yaml_text(front: Mapping[str, Any]) -> str:
    """Front matter without its lines of ``---``, keys in their order."""
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=100).strip()


def hub_id(base: str) -> str | None:
    """The base's id on the Hub, or ``None`` for the bundled one and for folders."""
    return base if _HUB_ID.fullmatch(base) else None


def base_tag(base: str) -> str:
    """The tag that stands for a base: the Hub makes those of ids itself, others are plain."""
    return f"base_model:{base}" if hub_id(base) else re.sub(r"[^\w.\-]+", "-", base) or "local-base"


def concept_tag(concept: str) -> str:
    """The tag that stands for an erased concept: "Van Gogh" → "concept:van-gogh"."""
    return f"concept:{slug_of(concept)}"


def sample_prompt(metadata: PatchMetadata) -> str | None:
    """A prompt that shows what a patch does; ``None`` for a stack, whose parts need not know theirs.

    Of several concepts it names the last one: that is in the preview of a patch that was continued too.
    """
    known = [one for one in metadata.erased if one.kind is not None]
    return known[-1].as_concept().target_prompt if known and metadata.parts is None else None


def is_unsafe(metadata: PatchMetadata) -> bool:
    """Whether it deals with unsafe content; in a mixed stack, parts of unknown kind count as if they did."""
    kinds = [metadata.kind, *(one.kind for one in metadata.erased)]
    return "nsfw" in kinds or (metadata.kind not in KINDS and None in kinds)


def front_matter(metadata: PatchMetadata, previews: Sequence[str]) -> dict[str, Any]:
    """The card's header.

    A base that is not on the Hub (the bundled one, a folder) cannot be linked, so it is a tag. Unsafe
    concepts show no picture in the widget, and are marked as not for all audiences.

    Args:
        metadata: of the patch.
        previews: pictures beside the card; the first is its thumbnail.
    """
    from huggingface_hub import ModelCardData

    linked, family, unsafe = hub_id(metadata.base), metadata.base_family, is_unsafe(metadata)
    prompt = sample_prompt(metadata)
    shown = previews if prompt is not None and not unsafe else ()
    tags = [
        *("text-to-image", "diffusers", "lora", "template:sd-lora"),
        *([] if linked else [base_tag(metadata.base)]),
        *(["stable-diffusion", family] if family.startswith("stable-diffusion") else []),
        *("concept-erasure", TAG, metadata.method),
        *(concept_tag(one.concept) for one in metadata.erased),
        *([UNSAFE_TAG] if unsafe else []),
    ]
    data = ModelCardData(
        base_model=linked,
        base_model_relation="adapter" if linked else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        **_license_of(metadata.base),
        tags=tags,
        instance_prompt=prompt,
        widget=[{"text": prompt, "output": {"url": url}} for url in shown] or None,
        thumbnail=previews[0] if previews else None,
    )
    return dict(data.to_dict())


def _license_of(base: str) -> dict[str, str]:
    """The licence of a patch is that of the base it is made of; this project's for the bundled one."""
    folded = base.casefold()
    if folded == "atelier":
        return {"license": _own("License-Expression", "other").lower()}
    if re.search(r"stable-diffusion-(v?1|inpainting)", folded) or folded.startswith("compvis/"):
        return {"license": "creativeml-openrail-m"}
    if re.search(r"stable-diffusion-(2|xl)", folded):
        return {"license": "openrail++"}
    unknown = {"license": "other", "license_name": "license-of-the-base-model"}
    return unknown | ({"license_link": f"https://huggingface.co/{base}"} if hub_id(base) else {})


def _own(field: str, default: str) -> str:
    """A field of this package's own metadata, which a plain checkout does not have."""
    try:
        return (importlib.metadata.metadata("recare-patch").get_all(field) or [default])[0]
    except importlib.metadata.PackageNotFoundError:
        return default


@dataclass(frozen=True)
class Identity:
    """What makes two cards speak of one patch: the tags of the same concepts, erased from the same base."""

    concepts: frozenset[str]
    base: str

    @classmethod
    def of(cls, metadata: PatchMetadata) -> Identity:
        """That of a patch."""
        tags = frozenset(concept_tag(one.concept) for one in metadata.erased)
        return cls(tags, base_tag(metadata.base))


def identity_in(front: Mapping[str, Any], like: Identity) -> Identity | None:
    """That of a card, which may be anybody's; ``None`` where it is not a patch's of this package.

    Args:
        front: the card's header.
        like: the patch it is held against: a base that is a plain tag cannot be told from others
            without knowing its name.
    """
    tags = front.get("tags")
    tags = {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, list) else set()
    if TAG not in tags:
        return None
    linked = front.get("base_model")
    linked = linked[0] if isinstance(linked, list) and linked else linked
    unlinked = like.base if like.base in tags else "another base"
    base = base_tag(linked) if isinstance(linked, str) else unlinked
    return Identity(frozenset(tag for tag in tags if tag.startswith("concept:")), base)


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's template: inside an installed package, beside it in a source checkout.

    Raises:
        PatchError: it is missing.
    """
    package = Path(__file__).parent.parent
    pages = jinja2.Environment(
        # Markdown has no escaping of its own: what a user wrote goes through ``plain``.
        autoescape=False,
        loader=jinja2.FileSystemLoader([package / "_hub", package.parent / "hub"]),
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {"plain": plain, "code": code, "quote": shlex.quote, "repr": repr}
    try:
        return pages.get_template(name)
    except jinja2.TemplateNotFound as fault:
        raise PatchError(f"the template {name} is not in this installation; reinstall the package") from fault


def card_text(
    metadata: PatchMetadata | None, training: Mapping[str, Any], *, previews: Sequence[str] = ("preview.png",)
) -> str:
    """A model card as the Hub reads it: YAML front matter, then Markdown.

    Args:
        metadata: of the patch, single or a stack.
        training: what the run's ``training.json`` holds: ``seconds``, ``denoiser_evaluations``,
            ``peak_memory_bytes``, ``device``, ``stages``, ``rank_residual`` and ``warnings``; what is
            missing, or was edited into nonsense, is left out.
        previews: pictures beside the card; the first is shown at its top.

    Returns:
        The text; it calls the patch's folder :data:`PLACE`.

    Raises:
        PatchError: the patch has no metadata, or the template is missing.
        ConceptError: what it erases is no concept.
    """
    if metadata is None:
        raise PatchError("a card needs a patch made by recare-patch, and this LoRA carries no such metadata")
    seconds = finite(training.get("seconds"))
    stages, warnings, parts = training.get("stages"), training.get("warnings"), metadata.parts
    known = [one for one in metadata.erased if one.kind is not None and parts is None]
    methods = [one.method for one in metadata.erased]
    methods.append(metadata.stacking.method if metadata.stacking is not None else metadata.method)
    # Without a home of its own the project is best explained by its method's paper.
    url = _own("Project-URL", ", https://arxiv.org/abs/2606.24192").split(",", 1)[1].strip()
    return template("card_template.md").render(
        about=metadata,
        recipe=metadata.parsed_recipe if metadata.recipe is not None else None,
        method=method_info(metadata.method) if metadata.method in METHODS else None,
        front_matter=yaml_text(front_matter(metadata, previews)),
        preview=previews[0] if previews else None,
        names=[f"**{plain(part.name)}**" for part in parts]
        if parts is not None
        else [f"**{plain(one.concept)}**" + (f" ({plain(one.kind)})" if one.kind else "") for one in metadata.erased],
        concepts=[one.as_concept() for one in known],
        care_words=list(dict.fromkeys(word for one in metadata.erased for word in one.care_words)),
        prompt=sample_prompt(metadata) or "a prompt of yours",
        place=PLACE,
        weights=WEIGHTS_NAME,
        kohya=concept_name(metadata.concept),
        on_hub=hub_id(metadata.base),
        project_url=url,
        facts=([] if seconds is None else [f"{seconds:,.0f} seconds"]) + spent(training),
        device=str(training.get("device") or ""),
        stages=[
            (str(name), finite(one.get("seconds")), finite(one.get("evaluations")))
            for name, one in (stages.items() if isinstance(stages, Mapping) else ())
            if isinstance(one, Mapping)
        ],
        residual=finite(training.get("rank_residual")),
        unmeasured=UNMEASURED,
        warnings=[str(one) for one in (warnings if isinstance(warnings, list) else ())],
        papers=[_citation(paper) for one in dict.fromkeys(methods) if (paper := _paper_of(one)) is not None],
    )


_STACKING = {
    "regmean": Paper(
        *("RegMean", "Jin et al.", "ICLR 2023", "2212.09849"),
        "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "International Conference on Learning Representations",
    ),
    "ties": Paper(
        *("TIES", "Yadav et al.", "NeurIPS 2023", "2306.01708"),
        "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
        "{TIES}-Merging: Resolving Interference When Merging Models",
        "Advances in Neural Information Processing Systems",
    ),
    "dare": Paper(
        *("DARE", "Yu et al.", "ICML 2024", "2311.03099"),
        "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "International Conference on Machine Learning",
    ),
}


def _paper_of(method: str | None) -> Paper | None:
    """Its method's file says it, or the table of ways of stacking; ``None`` where there is none, such as for a sum."""
    if method in METHODS:
        return method_info(method or "").paper
    return _STACKING.get(method or "")


def _citation(paper: Paper) -> dict[str, str]:
    """How a reader finds a paper, and how an author cites it."""
    year = paper.venue[-4:]
    fields = {"author": paper.author, "title": paper.title, "booktitle": paper.booktitle, "year": year}
    fields |= {"eprint": paper.arxiv, "archiveprefix": "arXiv"}
    kind = "inproceedings" if paper.booktitle else "misc"
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
    entry = "\n".join([f"@{kind}{{{paper.name.casefold()}{year},", *lines, "}"])
    url = f"https://arxiv.org/abs/{paper.arxiv}"
    return {"name": paper.name, "authors": paper.authors, "venue": paper.venue, "url": url, "bibtex": entry}
