"""Prompt-gated application: what opens a gate, and what each picture of a batch then gets of a patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from benchmarks.suites import suite
from recare_patch import load_base
from recare_patch.cli import cli
from recare_patch.core import IncompatiblePatchError, PatchError
from recare_patch.patch import CLOSED, OPEN, Gate, Patch, gated
from recare_patch.recipe import Concept
from tests.patch import making
from tests.patch.making import difference, state, trained

VAN_GOGH = Concept(text="Van Gogh", kind="style")
PROMPTS, SEEDS = ["a cat", "a dog by the sea", "a house by van gogh"], [5, 6, 7]
STRENGTHS = dict(zip(PROMPTS, (0.0, 0.5, 1.0), strict=True))


def by_table(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([STRENGTHS.get(prompt, 0.0) for prompt in prompts])


def draw(pipe: Any, prompts: Sequence[str] | None = PROMPTS, **options: Any) -> list[Image.Image]:
    return making.draw(pipe, prompts, steps=2, **options)


class TestGate:
    def test_it_tells_the_choosing_prompts_apart(self) -> None:
        pipeline = load_base("atelier", device="cpu").pipeline
        kinds = {"tench": ("tench", "object"), "nude": ("nudity", "nsfw"), "van gogh": ("Van Gogh", "style")}
        for name, (text, kind) in kinds.items():
            gate = Gate(pipeline, [Concept(text=text, kind=kind)])  # type: ignore[arg-type]
            for figure in suite(name, "choose"):
                found = gate([prompt for prompt, _ in figure.items])
                assert found.tolist() == [float(figure.group == "concept")] * len(found), figure.name
        # The names weigh as much in a long prompt.
        long = "a house and a tree, by van gogh, in a meadow with a boat and a car on a street at night"
        assert gate.likeness([long]) < gate.relatedness([long]) == 1
        assert gate.relatedness(["a street in Gogh, a boat on it"]) >= 0.5

    def test_likeness_is_the_share_of_the_way_between_the_two_means(
        self, pipe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate(pipe, [VAN_GOGH], care_words=["stars", "night"])
        words = gate.words
        assert words[:2] == ("stars", "night") and not {"van", "gogh", "the", "painting"} & set(words)

        def mean(prompts: Sequence[str]) -> np.ndarray:
            tokens = pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt")
            with torch.no_grad():
                rows = pipe.text_encoder(tokens.input_ids).pooler_output.double().numpy()
            unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
            return unit

        beside = "A painting of {0} in the style of {1}"
        named = [*VAN_GOGH.name_prompts, *(beside.format(word, "Van Gogh") for word in words)]
        forms = ("A painting of {0}", "A {0}", "A painting in the style of {0}", "A photo of {0}", beside)
        others = zip(words, (*words[1:], words[0]), strict=True)
        plain = [form.format(*both) for both in others for form in forms]
        origin, way = mean(plain), mean(named) - mean(plain)
        expected = [(mean([prompt]) - origin) @ way / (way @ way) for prompt in PROMPTS]
        assert gate.likeness(PROMPTS).numpy() == pytest.approx(expected, abs=1e-4)
        for prompts, one in ((named, 1), (plain, 0)):
            assert gate.likeness(prompts).mean() == pytest.approx(one, abs=1e-4)
        # It is a ramp.
        values = [-1.0, CLOSED, (CLOSED + OPEN) / 2, OPEN, 2.0]
        monkeypatch.setattr(gate, "relatedness", lambda prompts: torch.tensor(values))
        assert gate([""] * 5).tolist() == pytest.approx([0, 0, 0.5, 1, 1])

    def test_a_stack_opens_for_each_part_and_does_not_move_it(
        self, patch: Patch, text_patch: Patch, both: Patch, pipe: Any
    ) -> None:
        gate = Gate.of(both, pipe)
        assert [concept.text for concept in gate.concepts] == ["Van Gogh", "Monet"]
        assert gate(["a house by van gogh", "a painting in the style of monet"]).tolist() == [1, 1]
        assert Gate.of(patch, pipe)(["monet"]) < 1
        before = gate.likeness(PROMPTS)
        with text_patch.apply(pipe):
            assert torch.equal(gate.likeness(PROMPTS), before)
            assert torch.equal(Gate.of(both, pipe).likeness(PROMPTS), before)

    def test_what_cannot_be_gated_is_refused_and_nothing_is_touched(self, patch: Patch, pipe: Any) -> None:
        before = state(pipe)
        for make, told in (
            (lambda: gated(Patch(patch.tensors), pipe), "does not say what it erases"),
            (lambda: Gate(pipe, []), "at least one concept"),
            (lambda: gated(patch, pipe, float("nan")), "finite"),
        ):
            with pytest.raises(PatchError, match=told):
                make()
        pipe.tokenizer = None
        with pytest.raises(IncompatiblePatchError, match="no tokenizer"):
            gated(patch, pipe)
        assert state(pipe) == before


class TestApplied:
    """Every picture of a batch is the one that the patch would draw at that picture's own scale."""

    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}])
    def test_rows_of_a_batch(self, patch: Patch, pipe: Any, options: dict[str, Any]) -> None:
        scaled = {0.0: draw(pipe, **options)}
        for scale in (0.5, 1.0):
            with patch.apply(pipe, scale):
                scaled[scale] = draw(pipe, **options)
        with gated(patch, pipe, gate=by_table) as handle:
            found = draw(pipe, **options)
            # A change of scale multiplies.
            handle.applied.set_scale(0.5)
            halved = draw(pipe, **options)
        each = options.get("num_images_per_prompt", 1)
        for row, image in enumerate(found):
            scale = STRENGTHS[PROMPTS[row // each]]
            assert difference([image], [scaled[scale][row]]) <= (0 if scale == 0 else 1)
        assert difference(scaled[0.0], scaled[1.0]) > 0
        assert difference(halved[-1:], scaled[0.5][-1:]) <= 1
        assert handle.values == STRENGTHS

    def test_through_a_base_model_of_two_encoders(self, tiny_sdxl: Path) -> None:
        made, base = trained(tiny_sdxl)[1], load_base(tiny_sdxl, device="cpu")
        before = base.generate(PROMPTS, SEEDS, steps=2)
        with made.apply(base.pipeline):
            after = base.generate(PROMPTS, SEEDS, steps=2)
        assert Gate.of(made, base.pipeline)(["A painting in the style of Van Gogh"]) == 1
        with gated(made, base.pipeline, gate=by_table):
            found = base.generate(PROMPTS, SEEDS, steps=2)
        assert difference(found[:1], before[:1]) == 0 and difference(found[2:], after[2:]) <= 1
        assert difference(base.generate(PROMPTS, SEEDS, steps=2), before) == 0

    def test_embeddings_that_it_has_not_seen_made_are_drawn_at_the_full_scale(self, patch: Patch, pipe: Any) -> None:
        own, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        before = draw(pipe)
        with patch.apply(pipe):
            full = draw(pipe, None, prompt_embeds=own)
        with gated(patch, pipe, gate=lambda prompts: torch.zeros(len(prompts))):
            unseen = draw(pipe, None, prompt_embeds=own)
            seen, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
            kept = draw(pipe, None, prompt_embeds=seen)
        assert difference(unseen, full) <= 1 and difference(kept, before) == 0

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_gates_come_out_in_any_order(self, patch: Patch, pipe: Any, first: int) -> None:
        before, pictures = state(pipe), draw(pipe)
        handles = [gated(patch, pipe, gate=by_table), gated(patch, pipe, adapter_name="again", gate=by_table)]
        assert difference(draw(pipe)[:1], pictures[:1]) == 0
        handles[first].remove()
        assert difference(draw(pipe)[:1], pictures[:1]) == 0
        handles[1 - first].remove()
        handles[0].remove()
        assert difference(draw(pipe), pictures) == 0 and state(pipe) == before

    def test_a_patch_of_the_text_encoder(self, text_patch: Patch, pipe: Any) -> None:
        def encode() -> Any:
            return pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[PROMPTS[2]] * 3)

        plain = encode()
        with text_patch.apply(pipe, 0.5):
            half = encode()
        with text_patch.apply(pipe):
            whole = encode()
        with gated(text_patch, pipe, gate=by_table):
            found, against = encode()
        assert torch.equal(found[0], plain[0][0])
        assert torch.allclose(found[1], half[0][1], atol=1e-5)
        assert torch.allclose(found[2], whole[0][2], atol=1e-5)
        # The negative prompt names the concept, and is encoded as a prompt that does.
        assert torch.allclose(against, whole[1], atol=1e-5)
        assert not torch.allclose(plain[1], whole[1], atol=1e-2)


def test_generate_gated(patch: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    patch.save(tmp_path / "patch")
    places = f"--patch {tmp_path / 'patch'} --base {tiny_sd} --save-images {tmp_path / 'all'}"
    prompts = ["--prompt", "a cat", "--prompt", "van gogh"]
    words = ["generate", "--gated", *places.split(), "--count", "1", "--steps", "2", *prompts]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "'Van Gogh' at 1.00 of its scale for 'van gogh'" in result.stderr
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert pictures["01-seed0-before.png"] != pictures["01-seed0-after.png"]
