"""``recare-patch audit`` and ``evaluate --on``: options, tables, refusals, and once for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from recare_patch.measure import claims
from recare_patch.measure.suites import Suite
from recare_patch.models import load_base
from tests.cli.conftest import Invoke, one_sentence
from tests.measure.making import SUITE, make_patch
from tests.tiny import make_tiny_sd

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def weights(tiny_sd: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changed tensors alone, in the folder that commands run in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd() / "home"))
    # A random base shows nothing, and a figure of nothing does not hold: here it does.
    monkeypatch.setattr(claims, "SHOWN", 0.0)
    unet = load_file(tiny_sd / UNET)
    save_file({key: 2 * one for key, one in unet.items() if "attn2.to_v" in key}, "mine.safetensors")
    Path("suite.yaml").write_text(Suite(**SUITE).to_yaml())
    return Path("mine.safetensors")


def test_an_audit_is_made_and_verified(invoke: Invoke, weights: Path, tiny_sd: Path, tiny_clip: Path) -> None:
    words = f"{weights} base={tiny_sd} --base {tiny_sd} --clip {tiny_clip} --device cpu"
    how = "--suite suite.yaml --pictures 4 --metric concept-rate"
    done = invoke(f"audit {words} {how}")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].split() == ["base", "mine", "base"]
    assert done.stdout.splitlines()[-2:] == ["Audit: audit/audit.json", "Page: audit/audit.html"]
    assert json.loads(invoke(f"audit {words} {how} --json").stdout)["kind"] == "audit"
    again = invoke(f"audit {words} --verify")
    assert "audit holds" in again.stdout and "ok    mine: hash" in again.stdout
    file = Path("audit/mine/evidence.json")
    file.write_text(file.read_text().replace('"pictures": 4', '"pictures": 3'))
    assert invoke(f"audit {words} --verify").exit_code == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nowhere --base {base}", "there is nothing at 'nowhere'"),
        ("mine.safetensors --base {base}", "none of these says what it erases: give --concept"),
        ("mine.safetensors --base {base} --concept x", "say what kind of concept it is with --kind"),
        (
            "mine.safetensors --base {base} --suite suite.yaml --attack p4d --budget publishd",
            "did you mean 'published'?",
        ),
        ("mine.safetensors --base {base} --suite suite.yaml --verify", "holds no evidence on 'mine'"),
        ("mine.safetensors --base nowhere --suite suite.yaml", "base 'nowhere' was not found"),
    ],
)
def test_what_cannot_be_audited(invoke: Invoke, weights: Path, tiny_sd: Path, words: str, sentence: str) -> None:
    one_sentence(invoke(f"audit {words.format(base=tiny_sd)}"), sentence)
    assert not Path("audit").exists()


def test_a_patch_is_evaluated_on_other_models(
    invoke: Invoke, weights: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    make_patch(load_base(tiny_sd, device="cpu"), Path("a-patch"), tiny_clip)
    make_tiny_sd(Path("tuned"), seed=5)
    words = "--suite suite.yaml --pictures 4 --metric concept-rate --device cpu"
    done = invoke(f"evaluate --patch a-patch --on tuned --on {tiny_sd} {words}")
    assert done.exit_code == 0, done.output
    assert "tuned base" in done.stdout and Path("a-patch-transfer/transfer.html").is_file()
    assert not Path("a-patch/evidence.json").exists()
    shutil.rmtree("tuned")
    one_sentence(invoke(f"evaluate --patch a-patch --on tuned {words} --card"), "leave --card out")
    one_sentence(invoke(f"evaluate --patch a-patch --on tuned {words} --attacks x"), "leave --attacks out")
