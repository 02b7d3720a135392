"""The papers of the methods, of erasing and of stacking."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """How a reader finds a method's paper, and how an author cites it."""

    name: str
    authors: str
    venue: str
    """Where and when it appeared; ends with the year."""
    arxiv: str
    author: str
    title: str
    booktitle: str = ""

    @property
    def url(self) -> str:
        """Its page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """Its entry."""
        year = self.venue[-4:]
        fields = {"author": self.author, "title": self.title, "booktitle": self.booktitle, "year": year}
        fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        kind = "inproceedings" if self.booktitle else "misc"
        lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{self.name.casefold()}{year},", *lines, "}"])


_ICLR = "International Conference on Learning Representations"
_PAPERS = {
    "recare": Paper("ReCARE", "Kim et al.", "ICLR 2026", "2606.24192", "Kim and others", "{ReCARE}", _ICLR),
    "esd": Paper(
        *("ESD", "Gandikota et al.", "ICCV 2023", "2303.07345"),
        "Gandikota, Rohit and Materzy{\\'n}ska, Joanna and Fiotto-Kaufman, Jaden and Bau, David",
        "Erasing Concepts from Diffusion Models",
        "IEEE/CVF International Conference on Computer Vision",
    ),
    "s-grace": Paper("S-GRACE", "Yin et al.", "2025", "2510.27285", "Yin and others", "{S-GRACE}"),
    "forget-me-not": Paper(
        *("Forget-Me-Not", "Zhang et al.", "2023", "2303.17591"),
        "Zhang, Gong and Wang, Kai and Xu, Xingqian and Wang, Zhangyang and Shi, Humphrey",
        "{Forget-Me-Not}: Learning to Forget in Text-to-Image Diffusion Models",
    ),
    "uce": Paper(
        *("UCE", "Gandikota et al.", "WACV 2024", "2308.14761"),
        "Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzy{\\'n}ska, Joanna and Bau, David",
        "Unified Concept Editing in Diffusion Models",
        "IEEE/CVF Winter Conference on Applications of Computer Vision",
    ),
    "regmean": Paper(
        *("RegMean", "Jin et al.", "ICLR 2023", "2212.09849"),
        "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        _ICLR,
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


def citation(method: str | None) -> Paper | None:
    """The paper of a method, of erasing or of stacking; ``None`` where it has none, such as a plain sum."""
    return _PAPERS.get(method or "")
