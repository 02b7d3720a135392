"""What the original checkpoints of transformers call their layers, and LoRAs for either names.

ComfyUI, Forge and kohya's scripts know a model by its original names, and diffusers renames them: it also keeps
apart what the original holds as one weight, such as queries, keys and values. A LoRA for the whole weight is made
of its parts' by stacking their ``A`` and laying their ``B`` along a diagonal, and is taken apart again.

The names are facts of diffusers' converters (``scripts/convert_*_to_diffusers.py``, ``loaders/single_file_utils.py``,
``loaders/lora_conversion_utils.py``) and of ComfyUI's key maps (``comfy/lora.py``, ``comfy/utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from recare_patch.core import PatchError

_BLOCK = re.compile(r"(.*?(?:blocks|layers|_refiner))\.(\d+)\.(.+)")

Factors = tuple[Tensor, Tensor]
"""``A`` ``[rank, in, …]`` and ``B`` ``[out, rank]`` of a layer."""


@dataclass(frozen=True)
class Part:
    """One of diffusers' layers in an original weight, and its outputs as a multiple of its inputs, where they are."""

    module: str
    ratio: Fraction | None

    @classmethod
    def read(cls, text: str, prefix: str) -> Part:
        """``attn.to_q:1``, or ``norm1.linear``."""
        module, _, ratio = text.partition(":")
        return cls(prefix + module, Fraction(ratio) if ratio else None)


@dataclass(frozen=True)
class Joined:
    """A LoRA for one original weight.

    Attributes:
        name: of the weight.
        modules: diffusers' layers of which the weight has room, in its order.
        ranks: of each, 0 where it is not changed; None where there is only one.
        factors: of the whole.
    """

    name: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...] | None
    factors: Factors


@dataclass(frozen=True)
class OriginalNames:
    """The original names of one kind of transformer.

    Attributes:
        title: in messages.
        classes: diffusers' names of it.
        blocks: original block and diffusers' → the layers in it, original name → parts, first above; ``#`` is a number.
        architecture: as ModelSpec calls it.
        version: as kohya's scripts call it, where they know it.
        script: kohya's network module.
    """

    title: str
    classes: tuple[str, ...]
    blocks: Mapping[tuple[str, str], Mapping[str, str]]
    architecture: str
    version: str | None = None
    script: str = "networks.lora"

    @cached_property
    def layers(self) -> dict[str, tuple[Part, ...]]:
        """Original name → its parts, ``#`` for numbers."""
        return {
            theirs + name: tuple(Part.read(one, ours) for one in parts.split())
            for (theirs, ours), block in self.blocks.items()
            for name, parts in block.items()
        }

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        """Name in diffusers → original name, and which of its parts it is."""
        return {part.module: (name, i) for name, parts in self.layers.items() for i, part in enumerate(parts)}

    @cached_property
    def _underscored(self) -> list[tuple[re.Pattern[str], str]]:
        names = dict.fromkeys([*self.layers, *self._places])
        return [(re.compile(re.escape(n.replace(".", "_")).replace(r"\#", r"(\d+)")), n) for n in names]

    def named(self, short: str) -> str | None:
        """An original name, or one of diffusers', from a spelling in which dots are underscores."""
        for pattern, name in self._underscored:
            if match := pattern.fullmatch(short):
                return _numbered(name, match.groups())
        return None

    def modules(self, name: str) -> tuple[str, ...]:
        """The layers in diffusers of an original weight; a name that is diffusers' own stands for itself."""
        pattern, numbers = _pattern(name)
        return tuple(_numbered(part.module, numbers) for part in self.layers.get(pattern, ())) or (name,)

    def knows(self, module: str) -> bool:
        """Whether one of diffusers' layers has an original name."""
        return _pattern(module)[0] in self._places

    def fits(self, name: str, factors: Factors) -> bool:
        """Whether a LoRA for an original weight has the size that such weights have."""
        ratios = [part.ratio for part in self.layers.get(_pattern(name)[0], ())]
        a, b = factors
        return any(one is None for one in ratios) or not ratios or b.shape[0] == sum(ratios) * a.shape[1]  # type: ignore[arg-type]

    def join(self, changed: Mapping[str, Factors], source: str) -> Iterator[Joined]:
        """The LoRAs of original weights from those of diffusers' layers.

        Raises:
            PatchError: a layer has another size than beside it in one weight it could have.
        """
        seen: set[str] = set()
        for module in changed:
            pattern, numbers = _pattern(module)
            name = _numbered(self._places[pattern][0], numbers)
            if name in seen:
                continue
            seen.add(name)
            modules = self.modules(name)
            if len(modules) == 1:
                yield Joined(name, modules, None, _turned(name, changed[module]))
                continue
            found = [changed.get(one) for one in modules]
            inner = changed[module][0].shape[1]
            rows = _rows(self.layers[_pattern(name)[0]], inner, f"{source} has a '{module}'")
            for one, pair, row in zip(modules, found, rows, strict=True):
                if pair is not None and (pair[0].shape[1:], pair[1].shape[0]) != ((inner,), row):
                    raise PatchError(f"{source} has a '{one}' of another size than '{name}' has room for")
            blocks = [torch.zeros(row, 0) if pair is None else pair[1] for pair, row in zip(found, rows, strict=True)]
            dtype = changed[module][1].dtype
            a = torch.cat([pair[0] for pair in found if pair is not None])
            ranks = tuple(0 if pair is None else len(pair[0]) for pair in found)
            yield Joined(name, modules, ranks, (a, torch.block_diag(*(one.to(dtype) for one in blocks))))

    def split(self, name: str, factors: Factors, ranks: Sequence[int] | None, source: str) -> dict[str, Factors]:
        """The LoRAs of diffusers' layers from that of an original weight, the way back of :meth:`join`.

        Args:
            ranks: of each part, where the file tells; otherwise a part gets what changes it.

        Raises:
            PatchError: the size is no such weight's, or the ranks leave something out.
        """
        modules = self.modules(name)
        if len(modules) == 1:
            return {modules[0]: _turned(name, factors) if name != modules[0] else factors}
        a, b = factors
        rows = _rows(self.layers[_pattern(name)[0]], a.shape[1], f"{source} has a '{name}'")
        if (
            a.ndim != 2
            or sum(rows) != b.shape[0]
            or (ranks is not None and (len(ranks), sum(ranks)) != (len(rows), len(a)))
        ):
            raise PatchError(f"{source} has a '{name}' of another size than {self.title} has")
        found: dict[str, Factors] = {}
        at = 0
        for i, (module, part) in enumerate(zip(modules, b.split(rows), strict=True)):
            changing = part.ne(0).any(0)
            if ranks is not None:
                own = torch.zeros(len(a), dtype=torch.bool)
                own[at : at + ranks[i]] = True
                at += ranks[i]
                if (changing & ~own).any():
                    raise PatchError(f"{source} hides ranks: '{module}' has more than the {ranks[i]} that it tells")
                changing = own
            if changing.any():
                found[module] = (a[changing].contiguous(), part[:, changing].contiguous())
        return found


def _pattern(name: str) -> tuple[str, tuple[str, ...]]:
    """``joint_blocks.3.x`` → ``joint_blocks.#.x`` and the number of the block."""
    found = _BLOCK.fullmatch(name)
    return (f"{found[1]}.#.{found[3]}", (found[2],)) if found else (name, ())


def _numbered(pattern: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return pattern


def _rows(parts: Sequence[Part], inner: int, where: str) -> list[int]:
    rows = [part.ratio * inner for part in parts if part.ratio is not None]
    if any(one.denominator != 1 for one in rows):
        raise PatchError(f"{where} that reads {inner} values, of which no such weight is made")
    return [int(one) for one in rows]


def _turned(name: str, factors: Factors) -> Factors:
    """With scale and shift changed over, where the last layers of both have them in another order."""
    a, b = factors
    if not name.endswith("adaLN_modulation.1") or b.shape[0] != 2 * a.shape[1]:
        return factors
    return a, torch.cat(b.chunk(2)[::-1])


def _each(names: str) -> dict[str, str]:
    """Layers that both call the same."""
    return {name: name for name in names.split()}


_STREAMS = {
    "img_attn.qkv": "attn.to_q:1 attn.to_k:1 attn.to_v:1",
    "txt_attn.qkv": "attn.add_q_proj:1 attn.add_k_proj:1 attn.add_v_proj:1",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def _embedders(ours: str, **names: str) -> dict[str, str]:
    return {f"{theirs}.{side}_layer": f"{ours}.{one}.linear_{i}"
            for theirs, one in names.items() for i, side in ((1, "in"), (2, "out"))}  # fmt: skip


_TIMES = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
_FLUX = OriginalNames(
    "FLUX.1",
    ("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    {
        ("double_blocks.#.", "transformer_blocks.#."): _STREAMS
        | {
            "img_mlp.0": "ff.net.0.proj:4",
            "img_mlp.2": "ff.net.2:1/4",
            "txt_mlp.0": "ff_context.net.0.proj:4",
            "txt_mlp.2": "ff_context.net.2:1/4",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        ("single_blocks.#.", "single_transformer_blocks.#."): {
            "linear1": "attn.to_q:1 attn.to_k:1 attn.to_v:1 proj_mlp:4",
            "linear2": "proj_out:1/5",
            "modulation.lin": "norm.linear",
        },
        ("distilled_guidance_layer.layers.#.",) * 2: {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("", ""): _FLUX_ENDS
        | _embedders("time_text_embed", **_TIMES, vector_in="text_embedder")
        | _each("distilled_guidance_layer.in_proj distilled_guidance_layer.out_proj"),
    },
    "flux-1",
    "flux1",
    "networks.lora_flux",
)
_FLUX_2 = OriginalNames(
    "FLUX.2",
    ("Flux2Transformer2DModel",),
    {
        ("double_blocks.#.", "transformer_blocks.#."): _STREAMS
        | {
            "img_mlp.0": "ff.linear_in:6",
            "img_mlp.2": "ff.linear_out:1/3",
            "txt_mlp.0": "ff_context.linear_in:6",
            "txt_mlp.2": "ff_context.linear_out:1/3",
        },
        ("single_blocks.#.", "single_transformer_blocks.#."): {
            "linear1": "attn.to_qkv_mlp_proj:9",
            "linear2": "attn.to_out:1/4",
        },
        ("", ""): _FLUX_ENDS
        | _embedders("time_guidance_embed", **_TIMES)
        | {
            f"{name}.lin": f"{name}.linear"
            for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
        },
    },
    "flux-2",
)
_SD3 = OriginalNames(
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    {
        ("joint_blocks.#.", "transformer_blocks.#."): {
            "x_block.attn.qkv": "attn.to_q:1 attn.to_k:1 attn.to_v:1",
            "x_block.attn2.qkv": "attn2.to_q:1 attn2.to_k:1 attn2.to_v:1",
            "context_block.attn.qkv": "attn.add_q_proj:1 attn.add_k_proj:1 attn.add_v_proj:1",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.proj": "attn.to_add_out",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
        ("", ""): {
            "context_embedder": "context_embedder",
            "x_embedder.proj": "pos_embed.proj",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            **{
                f"{theirs}_embedder.mlp.{2 * i}": f"time_text_embed.{ours}_embedder.linear_{i + 1}"
                for theirs, ours in (("t", "timestep"), ("y", "text"))
                for i in range(2)
            },
        },
    },
    "stable-diffusion-3",
    "sd3",
    "networks.lora_sd3",
)
_Z_IMAGE = OriginalNames(
    "Z-Image",
    ("ZImageTransformer2DModel",),
    {
        (f"{block}.#.",) * 2: {
            "attention.qkv": "attention.to_q:1 attention.to_k:1 attention.to_v:1",
            "attention.out": "attention.to_out.0",
        }
        | _each("feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.0")
        for block in ("layers", "noise_refiner", "context_refiner")
    }
    | {
        ("", ""): _each("cap_embedder.1 t_embedder.mlp.0 t_embedder.mlp.2")
        | {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    },
    "z-image",
)
_LUMINA_2 = OriginalNames(
    "Lumina 2",
    ("Lumina2Transformer2DModel",),
    {
        (f"{block}.#.",) * 2: {
            "attention.qkv": "attn.to_q:1 attn.to_k:1/3 attn.to_v:1/3",
            "attention.out": "attn.to_out.0",
            "adaLN_modulation.1": "norm1.linear",
        }
        | {f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)}
        for block in ("layers", "noise_refiner", "context_refiner")
    }
    | {
        ("", ""): {
            "x_embedder": "x_embedder",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        }
    },
    "lumina-2",
)
_QWEN_IMAGE = OriginalNames(
    "Qwen-Image",
    ("QwenImageTransformer2DModel",),
    {
        ("transformer_blocks.#.",) * 2: _each(
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj "
            "attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2 img_mod.1 txt_mod.1"
        ),
        ("", ""): _each("img_in txt_in proj_out norm_out.linear")
        | _each("time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2"),
    },
    "qwen-image",
)
_KREA_2_BLOCK = {
    **{f"attn.w{one}": f"attn.to_{one}" for one in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{one}": f"ff.{one}" for one in ("gate", "up", "down")},
}
_KREA_2 = OriginalNames(
    "Krea 2",
    ("Krea2Transformer2DModel",),
    {
        ("blocks.#.", "transformer_blocks.#."): _KREA_2_BLOCK,
        ("txtfusion.layerwise_blocks.#.", "text_fusion.layerwise_blocks.#."): _KREA_2_BLOCK,
        ("txtfusion.refiner_blocks.#.", "text_fusion.refiner_blocks.#."): _KREA_2_BLOCK,
        ("", ""): {
            "first": "img_in",
            "last.linear": "final_layer.linear",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
        },
    },
    "krea-2",
)
KINDS = (_FLUX, _FLUX_2, _SD3, _Z_IMAGE, _LUMINA_2, _QWEN_IMAGE, _KREA_2)


def kind_of(modules: Iterable[str], told: str | None) -> OriginalNames | None:
    """Which transformer a patch is for: the class that it tells of, else the only one that has all these layers."""
    modules = tuple(modules)
    fitting = [kind for kind in KINDS if all(map(kind.knows, modules))]
    named = [kind for kind in fitting if told in kind.classes]
    return next(iter(named or fitting), None) if named or len(fitting) == 1 else None


def kinds_naming(shorts: Iterable[str], told: str | None) -> list[OriginalNames]:
    """The transformers of which all of a file's names can be, where dots are underscores; first the one it tells."""
    shorts = tuple(shorts)
    found = [kind for kind in KINDS if shorts and all(kind.named(short) for short in shorts)]
    return [kind for kind in found if told in kind.classes] or found


def split_all(
    kinds: Sequence[OriginalNames],
    found: Mapping[str, Factors],
    ranks: Mapping[str, Sequence[int]],
    modules: Iterable[str] | None,
    source: str,
) -> dict[str, Factors]:
    """LoRAs of diffusers' layers from those of original weights, of the transformer that they fit.

    Args:
        kinds: what the names allow.
        found: by original name.
        ranks: of each part of the weights of which the file tells it.
        modules: of the base that they are for, where it is known.

    Raises:
        PatchError: they fit none, or several.
    """
    there = None if modules is None else set(modules)
    fitting = [kind for kind in kinds if len(kinds) == 1 or all(kind.fits(*one) for one in found.items())]
    split: dict[tuple[str, ...], tuple[OriginalNames, dict[str, Factors]]] = {}
    for kind in fitting:
        parts: dict[str, Factors] = {}
        for name, factors in found.items():
            for module, pair in kind.split(name, factors, ranks.get(name), source).items():
                if module in parts:
                    raise PatchError(f"{source} holds '{module}' twice, by itself and in '{name}'")
                parts[module] = pair
        if there is None or parts.keys() <= there:
            split.setdefault(tuple(parts), (kind, parts))
    if len(split) != 1:
        titles = [kind.title for kind, _ in split.values()] or [kind.title for kind in kinds]
        told = f"the names of {' and '.join(titles)}"
        raise PatchError(
            f"{source} has {told}: say with --base for which it is"
            if split
            else f"{source} has {told}, and layers of another size or that the base does not have"
        )
    return next(iter(split.values()))[1]
