"""Patches in use: what can be used together, and a patch in a pipeline, taken out without a trace."""

from __future__ import annotations

import contextlib
import logging
import numbers
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recare_patch.core import IncompatiblePatchError, PatchError
from recare_patch.models import (
    COMPILED,
    DENOISERS,
    TEXT_ENCODERS,
    base_layers,
    full_name,
    in_words,
    inject,
    kept_requires_grad,
    named_tuner_layers,
    networks,
    off,
    remove_adapter,
    settle_adapter,
    split_name,
    tuner_layers,
)
from recare_patch.patch.metadata import PatchMetadata
from recare_patch.patch.patch import Patch, concept_name, in_figures

logger = logging.getLogger(__name__)

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class AppliedPatch:
    """A patch in a pipeline; as a context manager it takes the patch out at its end.

    diffusers loads the patch, network by network. Its ``load_lora_weights`` would warn of every network
    that gets nothing, and its ``set_adapters`` puts every other LoRA back to the weight 1.

    Attributes:
        patch: what was applied.
        pipe: where.
        adapter_name: how the pipeline calls it.
        scale: its strength.
    """

    def __init__(self, patch: Patch, pipe: Any, scale: float = 1.0, adapter_name: str | None = None) -> None:
        """See :meth:`Patch.apply`."""
        parts = networks(pipe)
        for part in patch.components:
            if part not in parts or (part in TEXT_ENCODERS and not hasattr(pipe, "load_lora_into_text_encoder")):
                raise IncompatiblePatchError(
                    f"patch {patch.name} does not fit a {type(pipe).__name__}: it has no {in_words(part)} "
                    "that takes LoRAs"
                )
        _check_strength(scale, "a patch")
        patch.check_shapes(parts, f"this {type(pipe).__name__}")
        self.patch, self.pipe, self.scale = patch, pipe, float(scale)
        self.adapter_name = _adapter_name(patch, parts, adapter_name)
        self._networks = {part: parts[part] for part in patch.components}
        self._raw = {full_name(part, name): name for part, net in parts.items() for name, _ in base_layers(net)}
        self._was_off: list[tuple[Any, list[str]]] = []
        self._hooks: list[Any] = []
        self._check_parts()
        with contextlib.ExitStack() as kept:
            for network in self._networks.values():
                kept.enter_context(_kept_flags(network))
            before = {part: _states(network) for part, network in self._networks.items()}
            try:
                for part, network in self._networks.items():
                    self._load(part, network)
            except Exception as fault:
                for part, network in self._networks.items():
                    remove_adapter(network, self.adapter_name)
                    _restore(before[part])
                reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
                raise IncompatiblePatchError(
                    f"patch {patch.name} could not be loaded into this {type(pipe).__name__}: {reason}"
                ) from fault
            for part, network in self._networks.items():
                self._switch_on(network, before[part])
        self._watch()

    def _check_parts(self) -> None:
        """Refuse networks in which what is added would not be heard.

        Raises:
            IncompatiblePatchError: attention layers are fused, or LoRAs into the weights.
        """
        for network in self._networks.values():
            if fused := {name for _, layer in tuner_layers(network) for name in layer.merged_adapters}:
                names = ", ".join(sorted(fused))
                raise IncompatiblePatchError(
                    f"patch {self.patch.name} would have no effect: LoRAs are fused into the weights ({names}); "
                    "call pipe.unfuse_lora() first, or pipe.unload_lora_weights() to leave them there"
                )
        for part, network in self._networks.items():
            on = {
                one for _, layer in tuner_layers(network) if not layer.disable_adapters for one in layer.active_adapters
            }
            if on and getattr(self.pipe, part, network) is not network:
                # Of a compiled network diffusers lists no LoRA, and takes none out.
                logger.warning(
                    "the compiled %s has a LoRA switched on (%s), which stays on beside the patch: "
                    "pipe.unload_lora_weights() leaves it there; unload before torch.compile",
                    in_words(part),
                    ", ".join(sorted(on)),
                )
        for name in self.patch.modules:
            part, _ = split_name(name)
            if part in self._networks:
                self._check_projection(name, self._networks[part])

    def _check_projection(self, name: str, network: nn.Module) -> None:
        """Refuse a layer in whose place its attention block calls one joined of several."""
        place, _, last = self._raw[name].rpartition(".")
        block = network.get_submodule(place)
        joined = ("to_k", "to_v") if getattr(block, "is_cross_attention", False) else ("to_q", "to_k", "to_v")
        # The block's own flag stays when diffusers takes the fusing back.
        if "Fused" in type(getattr(block, "processor", None)).__name__ and last in (*joined, *_ADDED):
            raise IncompatiblePatchError(
                f"patch {self.patch.name} has no effect where attention layers are fused (fuse_qkv_projections), as at "
                f"'{name}': call pipe.unfuse_qkv_projections() first"
            )

    def _load(self, part: str, network: nn.Module) -> None:
        others = [one for name, one in networks(self.pipe).items() if name != part]
        # diffusers takes a pipeline for offloaded, and offloads it anew, where one of its networks is.
        alone = hasattr(network, "_hf_hook") and not any(hasattr(one, "_hf_hook") for one in others)
        own = [name for name in self.patch.modules if split_name(name)[0] == part]
        # A part that was compiled by itself has that in its layers' names.
        places = {name: f"{part}.{self._raw[name]}" if COMPILED in self._raw[name] else name for name in own}
        tensors = {
            f"{places[name]}.lora_{side}.weight": factor
            for name in own
            for side, factor in zip("AB", self.patch.factors(name), strict=True)
        }
        common = {"adapter_name": self.adapter_name, "_pipeline": None if alone else self.pipe}
        # The text encoder's loader draws a start before it loads: keep the global generator's state.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            if part in TEXT_ENCODERS:
                self.pipe.load_lora_into_text_encoder(tensors, None, network, prefix=part, **common)
            elif not hasattr(network, "load_lora_adapter"):
                # A pipeline without a loader, such as PixArt's.
                inject(network, {self._raw[name]: len(self.patch.factors(name)[0]) for name in own}, self.adapter_name)
            else:
                loader: Any = network
                loader.load_lora_adapter(tensors, prefix=part, low_cpu_mem_usage=True, **common)
        layers = dict(self._layers({part: network}))
        if odd := sorted(set(own) ^ set(layers)):
            raise IncompatiblePatchError(f"the loader left out {len(odd)} of {len(own)} layers, first '{odd[0]}'")
        if alone:
            # The values went where the network's own are kept: nowhere, for now.
            settle_adapter(network, self.adapter_name)
        for name, layer in layers.items():
            down, up = layer.lora_A[self.adapter_name], layer.lora_B[self.adapter_name]
            if down.weight.dtype.itemsize == 1:
                # PEFT takes the dtype that weights are stored in, and no layer computes in 8 bits.
                down, up = down.to(_computes_in(layer)), up.to(_computes_in(layer))
            for factor in (down, up):
                # A loader may have taken the patch's own tensors, and these are written to.
                factor.weight.data = torch.empty_like(factor.weight.data)
            with torch.no_grad():
                down.weight.copy_(self.patch.factors(name)[0])
            self._scale(name, layer)

    def _scale(self, name: str, layer: Any) -> None:
        """Write ``B`` at the patch's scale, and leave PEFT's own at 1.

        That is where diffusers puts it after a call with ``cross_attention_kwargs={"scale": 0}``; and a compiled
        network is not compiled anew.
        """
        with torch.no_grad():
            layer.lora_B[self.adapter_name].weight.copy_(self.patch.factors(name)[1].float() * self.scale)
        layer.set_scale(self.adapter_name, 1.0)

    def _layers(self, parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
        return ((name, one) for name, one in named_tuner_layers(parts) if self.adapter_name in one.lora_A)

    def _switch_on(self, network: nn.Module, before: list[tuple[Any, list[str], bool]]) -> None:
        """Let the patch be heard beside what is on, and nothing else."""
        name = self.adapter_name
        known = {id(layer): (active, off) for layer, active, off in before}
        # Every layer lists all active adapters, also those it does not hold: diffusers asks the first.
        active_elsewhere = next((active for _, active, off in before if not off), [])
        for _, layer in tuner_layers(network):
            active, was_off = known.get(id(layer), (active_elsewhere, False))
            if was_off:
                # LoRAs that the user had switched off stay silent while the patch is on.
                self._was_off.append((layer, active))
                active = []
            layer.set_adapter([*active, name], inference_mode=True)
            if name in layer.lora_A:
                layer.enable_adapters(True)
                layer.lora_A[name].requires_grad_(False)
                layer.lora_B[name].requires_grad_(False)

    def _watch(self) -> None:
        """Look at every call whether the layers are fused, and at the first whether all of them are called."""
        for part, network in self._networks.items():
            layers = dict(self._layers({part: network}))
            outer: nn.Module = getattr(self.pipe, part)
            # What is compiled is not called through Python, and hooks inside would be compiled with it.
            if outer._compiled_call_impl is not None:
                continue
            idle = {} if any(map(_is_compiled, network.modules())) or outer is not network else dict.fromkeys(layers)
            looks = [layers[name].register_forward_pre_hook(partial(_forget, idle, name)) for name in idle]
            before = outer.register_forward_pre_hook(partial(self._before_call, network, tuple(layers)))
            after = outer.register_forward_hook(partial(self._after_call, idle, looks))
            self._hooks += [*looks, before, after]

    def _before_call(self, network: nn.Module, layers: Sequence[str], *_: Any) -> None:
        for name in layers:
            self._check_projection(name, network)

    def _after_call(self, idle: Mapping[str, None], looks: list[Any], *_: Any) -> None:
        while looks:
            looks.pop().remove()
        if idle:
            raise IncompatiblePatchError(
                f"patch {self.patch.name} has not its whole effect: this {type(self.pipe).__name__} does not call "
                f"{len(idle)} of its {len(self.patch.modules)} layers, first '{next(iter(idle))}'"
            )

    @property
    def active(self) -> bool:
        """Whether the pipeline still holds the patch."""
        now = networks(self.pipe)
        return any(True for _ in self._layers({k: one for k, one in self._networks.items() if now.get(k) is one}))

    @property
    def fused(self) -> bool:
        """Whether the patch is fused into the weights, as ``pipe.fuse_lora()`` does it."""
        return any(self.adapter_name in layer.merged_adapters for _, layer in self._layers(self._networks))

    @property
    def compiled(self) -> bool:
        """Whether torch has compiled a network that holds the patch, or a part of it."""
        whole = [getattr(self.pipe, part) for part in self._networks]
        return any(map(_is_compiled, (one for network in whole for one in network.modules())))

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the pipeline computes as the untouched base: without this patch, and without any other LoRA."""
        return off(*networks(self.pipe).values())

    def set_scale(self, scale: float) -> None:
        """Change the patch's strength, of a fused one too.

        Raises:
            PatchError: the scale is no finite number, or the patch is no longer in the pipeline.
        """
        _check_strength(scale, "a patch")
        if not self.active:
            raise PatchError(f"patch {self.patch.name} is no longer in the pipeline: apply it again")
        self.scale = float(scale)
        for name, layer in self._layers(self._networks):
            fused = _unfuse(layer) if self.adapter_name in layer.merged_adapters else []
            self._scale(name, layer)
            _fuse(layer, fused)

    def remove(self) -> None:
        """Take the patch out; the pipeline is then what it was. Removing twice does nothing.

        Raises:
            PatchError: it was fused into the weights, and its layers have been unloaded since.
        """
        for hook in self._hooks:
            hook.remove()
        held: set[str] = getattr(self.pipe, "_merged_adapters", set())
        lost, self._hooks = bool(self._hooks) and not any(True for _ in self._layers(self._networks)), []
        if lost and self.adapter_name in held:
            raise PatchError(
                f"patch {self.patch.name} cannot be taken out: it was fused into the weights and then unloaded: load "
                "the pipeline anew"
            )
        for network in self._networks.values():
            others = [(layer, _unfuse(layer)) for _, layer in self._layers({"": network}) if layer.merged_adapters]
            remove_adapter(network, self.adapter_name)
            with kept_requires_grad(network):
                present = {id(layer) for _, layer in tuner_layers(network)}
                for layer, fused in others:
                    _fuse(layer, [name for name in fused if name != self.adapter_name] if id(layer) in present else [])
                _restore([(layer, active, True) for layer, active in self._was_off if id(layer) in present])
        if self.adapter_name in held:
            self.pipe._merged_adapters = held - {self.adapter_name}
        self._was_off = []

    def __enter__(self) -> AppliedPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _unfuse(layer: Any) -> list[str]:
    """Take all LoRAs out of a layer's weights; gives their names."""
    fused = list(layer.merged_adapters)
    if fused:
        layer.unmerge()
    return fused


def _fuse(layer: Any, names: list[str]) -> None:
    if names:
        layer.merge(adapter_names=names)


def _computes_in(layer: Any) -> torch.dtype:
    """The dtype that diffusers' layerwise casting computes in."""
    hooks = getattr(layer.get_base_layer(), "_diffusers_hook", None)
    casting = hooks.get_hook("layerwise_casting") if hooks is not None else None
    return casting.compute_dtype if casting is not None else torch.get_default_dtype()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, COMPILED[:-1]) or module._compiled_call_impl is not None


def _forget(idle: dict[str, None], name: str, *_: Any) -> None:
    idle.pop(name, None)


def _adapter_name(patch: Patch, parts: Mapping[str, nn.Module], wanted: str | None) -> str:
    taken = {name for network in parts.values() for name in getattr(network, "peft_config", {})}
    if wanted is not None:
        if wanted in taken:
            raise PatchError(f"the pipeline already holds an adapter named '{wanted}'")
        if not isinstance(wanted, str) or not wanted or "." in wanted:
            raise PatchError(f"'{wanted}' cannot name an adapter: it must be text without dots")
        return wanted
    stem = concept_name(patch.metadata.concept if patch.metadata else Path(patch.source).stem)
    number, name = 2, stem
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _check_strength(scale: object, whose: str) -> None:
    """Refuse a scale that is no finite number, whatever it is instead."""
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    # Not isfinite: it stumbles over whole numbers that no float holds.
    if not (number and -sys.float_info.max <= scale <= sys.float_info.max):  # type: ignore[operator]
        given = f"{scale!r:.40}" if isinstance(scale, str | float | None) else f"a {type(scale).__name__}"
        raise PatchError(f"the scale of {whose} must be a finite number, got {given}")


@contextlib.contextmanager
def _kept_flags(network: nn.Module) -> Iterator[None]:
    """Loading switches gradients, and puts a text encoder into evaluation mode: put all back as it was."""
    modes = {id(module): module.training for module in network.modules()}
    try:
        with kept_requires_grad(network):
            yield
    finally:
        for module in network.modules():
            module.training = modes.get(id(module), network.training)


def _states(network: nn.Module) -> list[tuple[Any, list[str], bool]]:
    return [(one, list(one.active_adapters), bool(one.disable_adapters)) for _, one in tuner_layers(network)]


def _restore(before: list[tuple[Any, list[str], bool]]) -> None:
    for layer, active, was_off in before:
        layer.set_adapter(active)
        layer.enable_adapters(not was_off)


@contextlib.contextmanager
def apply_all(pipe: Any, patches: Sequence[tuple[Patch, float]]) -> Iterator[tuple[AppliedPatch, ...]]:
    """Put several patches, each with its scale, into a pipeline at once, and take them out at the end.

    Raises:
        PatchError, IncompatiblePatchError: as :func:`check_together`, before the pipeline is touched, and
            as :meth:`Patch.apply`, with the pipeline as it was.
    """
    if patches:
        check_together(patches)
    with contextlib.ExitStack() as applied:
        yield tuple(applied.enter_context(patch.apply(pipe, scale)) for patch, scale in patches)


def check_together(patches: Sequence[tuple[Patch, float]]) -> PatchMetadata | None:
    """Refuse patches that cannot be used as one: of different bases or shapes, or with odd scales.

    Only networks that both change are compared: a patch for a text encoder belongs to every base that
    has this encoder, whatever denoiser it was made with.

    Returns:
        What the patches say of the base they were made for, the first of them for a start; ``None`` if
        none does.

    Raises:
        PatchError: there are none, or a scale is not finite.
        IncompatiblePatchError: two were made for different base models.
    """
    if not patches:
        raise PatchError("no patch was given, and at least one is needed")
    for patch, scale in patches:
        _check_strength(scale, f"patch {patch.name}")
    told: dict[str, PatchMetadata] = {}
    shapes: dict[str, Patch] = {}
    for patch, _ in patches:
        if patch.metadata is None:
            logger.warning(
                "%s does not say what base it was made for: whether it belongs to these weights is unknown", patch.name
            )
        else:
            for part in patch.components:
                _check_same_base(told.setdefault(part, patch.metadata), patch.metadata, part)
        for module in patch.modules:
            other = shapes.setdefault(module, patch)
            one, two = other.mapping(module), patch.mapping(module)
            if one != two:
                raise IncompatiblePatchError(
                    f"patches {other.name} and {patch.name} do not fit each other: module '{module}' maps "
                    f"{in_figures(one)} in one, and {in_figures(two)} in the other"
                )
    if not told:
        return None
    # Of the patches that change the denoiser where there are any: the others ask for no certain one.
    found = next((told[part] for part in DENOISERS if part in told), next(iter(told.values())))
    hashes = {part: one.component_hash(part) for part, one in told.items() if part in TEXT_ENCODERS}
    encoders = {part: digest for part, digest in hashes.items() if digest}
    return found.model_copy(update={"base_text_encoders_sha256": encoders or None})


def _check_same_base(one: PatchMetadata, other: PatchMetadata, part: str) -> None:
    if one.component_hash(part) == other.component_hash(part):
        return
    second = f"other weights called '{other.base}'" if one.base == other.base else f"'{other.base}'"
    raise IncompatiblePatchError(
        f"patch '{one.concept}' was made for base '{one.base}' and patch '{other.concept}' for {second}: "
        "patches of one base only can be used as one"
    )
