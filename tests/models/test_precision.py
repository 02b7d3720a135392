"""Loss scaling, the precision and device that are really used, and weights and pictures that are no numbers."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from recare_patch.core import BaseModelError, NonFiniteError, UnknownNameError
from recare_patch.models import (
    PLACEHOLDER,
    LossScale,
    chosen_device,
    forget_peak_memory,
    load_base,
    lora,
    peak_memory,
    usable_precision,
)
from recare_patch.models.precision import in_double
from recare_patch.recipe import MemoryOptions

FOLDERS = ("tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sd3")
SMALL = 2.0**-9
"""A loss this small sends back at tiny latents what one does at SDXL's: 2e-7, where predictions are 0.03 off."""


def _gradient(folder: Path, precision: str, what: str, scale: bool) -> torch.Tensor:
    base = load_base(folder, precision=precision, device="cpu")
    layers = {"layers": "cross-attention", "rank": 4, "alpha": 4.0}
    parameters = lora.attach(base.denoiser, **layers, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *base.latent_shape), generator=generator)
    with torch.no_grad():
        for one in parameters:
            one.add_(0.01 * torch.randn(one.shape, generator=generator))
    embeds = base.encode_prompts(["stars", "Van Gogh"])
    if what == "vectors":
        base.denoiser.requires_grad_(False)
        parameters = [nn.Parameter(base.word_vector("monet").repeat(2, 1))]
        embeds = base.encode_with_vectors([f"A painting by {PLACEHOLDER}", f"{PLACEHOLDER}!"], parameters[0])
    made = base.denoise(latents, torch.tensor([100, 700]), embeds).float()
    loss = F.mse_loss(made, made.detach() + 0.03 * torch.randn(made.shape, generator=generator)) * SMALL
    assert LossScale(base.dtype if scale else torch.float32).backward(loss, parameters)
    return torch.cat([one.grad.flatten() for one in parameters if one.grad is not None])


@pytest.mark.parametrize("what", ["LoRA", "vectors"])
@pytest.mark.parametrize("name", FOLDERS)
def test_gradients_in_fp16_are_those_in_fp32(name: str, what: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    exact = _gradient(folder, "fp32", what, True)
    cosine = {s: F.cosine_similarity(_gradient(folder, "fp16", what, s), exact, dim=0) for s in (True, False)}
    assert cosine[True] > 0.99
    assert cosine[False] < 0.9, "this loss would not need its scale"


def test_a_step_that_overflows_is_left_out_and_the_scale_falls_and_grows() -> None:
    scaling, weight = LossScale(torch.float16), nn.Parameter(torch.tensor([1.0, 2.0]))

    def step(size: float = 1.0) -> bool:
        return scaling.backward((weight.half().float() * size).sum(), [weight])

    assert not step(1e3) and scaling.scale == 2.0**12  # a first good step is looked for in large strides
    assert step() and weight.grad is not None and weight.grad.tolist() == [1.0, 1.0]
    assert not step(1e3) and scaling.scale == 2.0**11
    for _ in range(200):
        assert step()
    assert scaling.scale == 2.0**12
    again = LossScale(torch.float16)
    again.state = scaling.state
    assert vars(again) == vars(scaling)
    with pytest.raises(NonFiniteError, match=r"gradient of the loss is NaN or infinite: try --precision bf16 or fp32"):
        while not step(1e6):
            pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_scaled_where_it_need_not_be(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([0.0, 3.0]))
    assert LossScale(dtype).backward((weight * 2.0**100).sum(), [weight])
    assert weight.grad is not None and weight.grad.tolist() == [2.0**100] * 2
    with pytest.raises(NonFiniteError, match="a gradient of the loss"):
        LossScale(dtype).backward(weight.sqrt().sum(), [weight])
    with pytest.raises(NonFiniteError, match=r"^the loss is NaN: .*a lower learning rate"):
        LossScale(dtype).backward(weight.sum() * torch.nan, [weight])


def test_all_processes_leave_out_the_same_step() -> None:
    class Others:
        def mean_gradients(self, parameters: list[nn.Parameter]) -> None:
            parameters[0].grad = torch.tensor([torch.inf])

    weight, crew = nn.Parameter(torch.ones(1)), Others()
    assert not LossScale(torch.float16).backward(weight.sum(), [weight], crew)  # type: ignore[arg-type]


def _machine(monkeypatch: pytest.MonkeyPatch, *kinds: str, bf16: bool = True) -> None:
    """A machine with such devices."""
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu)):
        monkeypatch.setattr(backend, "is_available", lambda kind=kind: kind in kinds)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 123)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)


@pytest.mark.parametrize(
    ("kinds", "chosen"), [(("mps", "cuda"), "cuda"), (("mps",), "mps"), (("xpu",), "xpu"), ((), "cpu")]
)
def test_auto_takes_the_accelerator_that_is_there(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], chosen: str
) -> None:
    _machine(monkeypatch, *kinds)
    assert chosen_device("auto").type == chosen
    for other in {"cuda", "mps", "xpu"} - set(kinds):
        with pytest.raises(BaseModelError, match=f"'{other}' is not available"):
            chosen_device(other)
    with pytest.raises(BaseModelError, match="'gpu' is no device: give auto, cpu, cuda, mps, xpu"):
        chosen_device("gpu")


@pytest.mark.parametrize("device", ["cuda:0", "mps", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_only_where_the_card_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, bf16: bool
) -> None:
    _machine(monkeypatch, "cuda", "mps", bf16=bf16)
    found, told = usable_precision(precision, torch.device(device))
    falls = precision == "bf16" and device != "cpu" and not bf16
    assert found == ("fp16" if falls else precision)
    assert (told is not None) == falls and (told is None or "does not compute in bf16: fp16 is used" in told)
    with pytest.raises(UnknownNameError, match="did you mean 'fp16'"):
        usable_precision("f16", torch.device(device))


def test_what_apples_gpus_lack(monkeypatch: pytest.MonkeyPatch, tiny_sd: Path) -> None:
    _machine(monkeypatch, "mps")
    with pytest.raises(BaseModelError, match="int8 has no kernels on mps"):
        load_base(tiny_sd, device="mps", memory=MemoryOptions(weights="int8"))
    forget_peak_memory(torch.device("mps"))
    assert peak_memory(torch.device("mps")) == 123

    class Apples:
        device = torch.device("mps")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    assert in_double(Apples()).dtype is torch.float64  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "value", "precision", "told"),
    [
        ("unet", torch.nan, "fp32", "a unet with 1 NaN or infinite weights, first in '.*'; its file may be damaged"),
        ("vae", torch.inf, "bf16", "a vae with 1 NaN"),
        ("text_encoder", 1e6, "fp16", "too large for fp16: try --precision bf16 or fp32"),
    ],
)
def test_weights_that_are_no_numbers_are_found_at_loading(
    part: str, value: float, precision: str, told: str, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match=told):
        load_base(folder, precision=precision, device="cpu")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_autoencoder_that_overflows_in_fp16_computes_in_fp32(
    tiny_sd: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base(tiny_sd, precision=precision, device="cpu")
    image, rows = [Image.new("RGB", (32, 32), "red")], torch.zeros((1, *base.latent_shape))
    for part, call in (("encoder", lambda: base.encode_images(image)), ("decoder", lambda: base.decode_latents(rows))):
        nn.Module.to(base.pipeline.vae, dtype=base.dtype)

        def hook(module: nn.Module, args: Any, made: torch.Tensor) -> torch.Tensor:
            return made * torch.nan if made.dtype is base.dtype else made

        handle = getattr(base.pipeline.vae, part).register_forward_hook(hook)
        if precision == "fp16":
            assert len(call()) == 1 and "overflows in fp16" in caplog.text
        else:
            with pytest.raises(NonFiniteError, match=r"that the autoencoder of base tiny-sd makes hold NaN"):
                call()
        handle.remove()
