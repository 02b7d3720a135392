r"""How the loaders of ComfyUI, A1111 and sd-scripts read our kohya files, held against the patch itself.

    python -m benchmarks.real_clients --patch van-gogh-patch --base path/to/stable-diffusion-1.5 \
        --comfyui path/to/ComfyUI --a1111 path/to/stable-diffusion-webui --sd-scripts path/to/sd-scripts

Nothing is fetched: each client's sources are given by path, and its own code does the reading.

* ComfyUI, ``comfy/lora.py``: ``load_lora`` gives an update for each weight, by the names that its key maps make of
  ``comfy.utils.unet_to_diffusers`` and ``LORA_CLIP_MAP``.
* A1111, ``extensions-builtin/Lora``: ``networks.convert_diffusers_name_to_compvis`` names the module, and
  ``alpha / dim`` is the scale (``network.py``). The extension imports the whole web UI, so its function is taken out
  of the file and run alone.
* sd-scripts, ``networks/lora.py``: ``create_network_from_weights`` builds modules around the base's layers.

For every layer the client's ΔW is compared with ``B A`` of the patch, both in float64.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from recare_patch.core import RecarePatchError
from recare_patch.models import named_layers, networks, split_name
from recare_patch.patch import Patch, write_kohya

Updates = dict[str, Tensor]
"""A layer's full name → what is added to its weight, float64."""


class ClientError(RecarePatchError):
    """A client's sources are not where they were said to be, or are of another version."""


@dataclass
class Report:
    """What one client made of a file."""

    client: str
    updates: Updates
    left: list[str] = field(default_factory=list)

    def row(self, wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Client, layers found of all, names left over, largest difference relative to a layer's largest value."""
        missing = wanted.keys() - self.updates.keys()
        apart = [
            float((self.updates[name].reshape(one.shape) - one).abs().max() / one.abs().max().clamp_min(1e-300))
            for name, one in wanted.items()
            if name not in missing
        ]
        told = f"{max(apart):.1e}" if apart else "–"
        return self.client, f"{len(apart)} of {len(wanted)}", str(len(self.left) + len(missing)), told


def wanted_updates(patch: Patch) -> Updates:
    """``B A`` of each layer as the kohya file has it, float64."""
    found = {}
    for name in patch.modules:
        a, b = (factor.to(torch.float16).double() for factor in patch.factors(name))
        found[name] = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
    return found


def source(root: Path, *names: str) -> Path:
    """The first of a client's files that is there.

    Raises:
        ClientError: none is.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ClientError(f"{root} does not hold {' or '.join(names)}: give the folder of the client's checkout")


def imported(root: Path, module: str) -> Any:
    """A client's own module, with its root on the path for its imports.

    Raises:
        ClientError: it needs what is not installed here.
    """
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        raise ClientError(
            f"{module} of {root} needs {fault.name or fault}: install the client's requirements"
        ) from fault
    finally:
        sys.path.remove(str(root))


def comfyui_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's configuration as ComfyUI detects it in an original checkpoint, as far as it names layers."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    down = [depth * ("CrossAttn" in kind) for depth, kind in zip(depths, config["down_block_types"], strict=True)]
    up = [depth * ("CrossAttn" in kind) for depth, kind in zip(depths[::-1], config["up_block_types"], strict=True)]
    return {
        "num_res_blocks": [layers] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        # Taken from its end.
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)][::-1],
        "transformer_depth_middle": depths[-1],
    }


def through_comfyui(root: Path, file: Path, pipe: Any, layers: Mapping[str, nn.Module]) -> Report:
    """Updates by ``comfy.lora.load_lora``."""
    from safetensors.torch import load_file

    from recare_patch.patch.original_layout import unet_name

    source(root, "comfy/lora.py")
    lora, utils = imported(root, "comfy.lora"), imported(root, "comfy.utils")
    config = dict(pipe.unet.config)
    # The weight of an original checkpoint → the layer of ours.
    ours: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name in layers:
        component, module = split_name(name)
        if component == "unet" and (original := unet_name(f"{module}.weight", config)):
            ours[original.removeprefix("model.")] = name
    for theirs, original in utils.unet_to_diffusers(comfyui_config(config)).items():
        if theirs.endswith(".weight"):
            keys[f"lora_unet_{theirs.removesuffix('.weight').replace('.', '_')}"] = f"diffusion_model.{original}"
    for clip, component, prefixes in (
        ("clip_l", "text_encoder", ("lora_te", "lora_te1")),
        ("clip_g", "text_encoder_2", ("lora_te2",)),
    ):
        for layer in range(32):
            for part, short in lora.LORA_CLIP_MAP.items():
                weight = f"{clip}.transformer.text_model.encoder.layers.{layer}.{part}.weight"
                ours[weight] = f"{component}.text_model.encoder.layers.{layer}.{part}"
                keys |= {f"{one}_text_model_encoder_layers_{layer}_{short}": weight for one in prefixes}
    stored = load_file(file)
    updates: Updates = {}
    left = {key.split(".")[0] for key in stored} - keys.keys()
    for weight, adapter in lora.load_lora(dict(stored), keys).items():
        # Since adapters are classes, their weights are an attribute: up, down, alpha, middle, …
        up, down, alpha = (adapter.weights if hasattr(adapter, "weights") else adapter[1])[:3]
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        if weight in ours:
            updates[ours[weight]] = scale * (up.double().flatten(1) @ down.double().flatten(1))
        else:
            left.add(weight)
    return Report("ComfyUI", updates, sorted(left))


def through_a1111(root: Path, file: Path, layers: Mapping[str, nn.Module]) -> Report:
    """Modules by A1111's own renaming, and its ``alpha / dim``."""
    from safetensors.torch import load_file

    rename = function_of(source(root, "extensions-builtin/Lora/networks.py"), "convert_diffusers_name_to_compvis")
    is_sd2 = any(one.in_features == 1024 for name, one in layers.items() if re.search(r"attn2\.to_k$", name))  # type: ignore[union-attr]
    stored = load_file(file)
    # What a layer is called there, by the same code: two layers of one name would fall together.
    theirs: dict[str, str] = {}
    for name in layers:
        component, module = split_name(name)
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}.get(component, "lora_te2")
        theirs.setdefault(rename(f"{prefix}_{module.replace('.', '_')}", is_sd2), name)
    updates, left = {}, []
    for short in sorted({key.split(".")[0] for key in stored}):
        name = theirs.get(rename(short.replace("lora_te1_", "lora_te_"), is_sd2))
        if name is None:
            left.append(short)
            continue
        up, down = (stored[f"{short}.lora_{side}.weight"].double() for side in ("up", "down"))
        scale = float(stored[f"{short}.alpha"]) / down.shape[0]
        updates[name] = scale * (up.flatten(1) @ down.flatten(1))
    return Report("A1111", updates, left)


def function_of(file: Path, name: str) -> Callable[..., str]:
    """A function of a source file, with the plain constants and functions beside it, and nothing else run.

    Raises:
        ClientError: the file has none of this name.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    plain = (ast.FunctionDef, ast.Assign)
    kept = [node for node in tree.body if isinstance(node, plain)]
    if not any(getattr(node, "name", None) == name for node in kept):
        raise ClientError(f"{file} has no {name}: this script knows the versions that have it")
    space: dict[str, Any] = {"re": re, "os": importlib.import_module("os")}
    for node in kept:
        if isinstance(node, ast.FunctionDef):
            # Annotations and defaults may need what is not imported.
            node.returns, node.decorator_list = None, []
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        try:
            exec(compile(ast.Module([node], []), str(file), "exec"), space)
        except Exception:
            continue
    return space[name]  # type: ignore[no-any-return]


def through_sd_scripts(root: Path, file: Path, pipe: Any) -> Report:
    """Updates of the modules that ``create_network_from_weights`` builds around the base's own."""
    source(root, "networks/lora.py")
    lora = imported(root, "networks.lora")
    parts = networks(pipe)
    encoders = [one for name, one in parts.items() if name.startswith("text_encoder")]
    network, weights = lora.create_network_from_weights(
        1.0, str(file), pipe.vae, encoders if len(encoders) > 1 else encoders[0], parts["unet"]
    )
    network.apply_to(encoders if len(encoders) > 1 else encoders[0], parts["unet"], True, True)
    told = network.load_state_dict(weights, strict=False)
    owners = {id(one): name for name, one in named_layers(parts).items()}
    updates: Updates = {}
    for module in (*network.text_encoder_loras, *network.unet_loras):
        # apply_to() takes the layer's forward and forgets the layer.
        layer = getattr(module.org_forward, "__self__", None)
        up, down = module.lora_up.weight.double(), module.lora_down.weight.double()
        updates[owners[id(layer)]] = float(module.scale) * (up.flatten(1) @ down.flatten(1)).detach()
    return Report("sd-scripts", updates, [*told.unexpected_keys, *told.missing_keys])


def compare(patch: Patch, pipe: Any, roots: Mapping[str, Path | None]) -> list[tuple[str, ...]]:
    """A row for each client whose sources are given; one that cannot be used says why."""
    layers = {name: one for name, one in named_layers(networks(pipe)).items() if isinstance(one, nn.Linear | nn.Conv2d)}
    rows, wanted = [], wanted_updates(patch)
    with tempfile.TemporaryDirectory() as place:
        file = write_kohya(patch, Path(place) / "kohya.safetensors")
        ways: dict[str, Callable[[Path], Report]] = {
            "ComfyUI": lambda root: through_comfyui(root, file, pipe, layers),
            "A1111": lambda root: through_a1111(root, file, layers),
            "sd-scripts": lambda root: through_sd_scripts(root, file, pipe),
        }
        for client, way in ways.items():
            root = roots.get(client)
            if root is None:
                continue
            try:
                rows.append(way(root.expanduser()).row(wanted))
            except ClientError as fault:
                rows.append((client, f"not compared: {fault}", "", ""))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=Path, required=True)
    parser.add_argument("--base", default="atelier", help="a pipeline folder, a hub id or atelier")
    clients = {"ComfyUI": "--comfyui", "A1111": "--a1111", "sd-scripts": "--sd-scripts"}
    for client, option in clients.items():
        parser.add_argument(option, type=Path, help=f"the checkout of {client}", dest=client)
    parser.add_argument("--json", action="store_true")
    given = SimpleNamespace(**vars(parser.parse_args()))
    roots = {client: getattr(given, client) for client in clients}
    if not any(roots.values()):
        parser.error(f"name the sources of a client at least: {', '.join(clients.values())}")
    from recare_patch.models import load_base

    rows = compare(Patch.load(given.patch), load_base(given.base, device="cpu").pipeline, roots)
    head = ("client", "layers", "left over", "largest relative difference")
    if given.json:
        print(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2))
        return
    for row in (head, ("---",) * 4, *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
