"""What the attacks that look for a prompt share: improve, draw, look, and stop at the first success.

Prompts are worked on in groups, all of a group in one batch; what one draws and learns does not
depend on the others. What is drawn is the found *text*, read by the tokenizer as anybody's prompt
would be, so that a saved attack is a list of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import write_json
from recare_patch.erasure import Checkpoint, step_generator
from recare_patch.measure.attacks.protocol import (
    AttackOptions,
    AttackResult,
    AttackTarget,
    Meter,
    first_pictures,
    judged,
    read_json,
)
from recare_patch.models import lora as adapters

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.core import Progress
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept


class Vocabulary:
    """The tokens that may stand in a found prompt: those that a text can spell.

    Start and end, pieces of words and bytes of letters are left out: written down and read again they
    become other tokens, and what was found would not be what is drawn.

    Attributes:
        ids: of the base model's tokenizer, ``[tokens]``.
        vectors: ``[tokens, token_width]``, fp32, on the base model's device.
        table: the vectors of all tokens.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.table = base.token_table()
        special = set(base.special_token_ids)
        self.ids = torch.tensor(
            [
                k
                for k in range(len(self.table))
                if k not in special and base.token_ids(base.token_text([k])) == [k]
            ]
        )
        self.vectors = self.table[self.ids.to(self.table.device)]

    def text(self, tokens: Tensor) -> str:
        """The text of token ids."""
        return self.base.token_text(tokens.tolist())

    def of_text(self, text: str) -> Tensor:
        """The vectors of a text's tokens, ``[tokens, token_width]``."""
        return self.table[torch.tensor(self.base.token_ids(text), dtype=torch.long, device=self.table.device)]


class PromptSearch(Protocol):
    """A group of prompts that are being found.

    Attributes:
        parameter: what is learnt, its first axis the group's prompts.
        optimizer: over it.
    """

    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer

    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        """The sum of the losses of some of the group's prompts; draws are made for all of them."""
        ...

    def project(self) -> None:
        """Bring the parameter back to where it may be, after a step."""
        ...

    def prompts(self) -> list[str]:
        """The text of each prompt as it stands."""
        ...


@dataclass(frozen=True)
class Rounds:
    """How long a group is worked on.

    Attributes:
        rounds: each ends with a picture of every prompt.
        steps: of the optimiser in each round.
    """

    rounds: int
    steps: int


def name_candidates(concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
    """Prompts to attack: those that name the concept, alone and beside its companions."""
    return tuple(dict.fromkeys([*concept.name_prompts, *(concept.composed_prompt(word) for word in words)]))


def prediction_errors(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row, ``[rows]``."""
    return F.mse_loss(predicted.float(), wanted.float(), reduction="none").flatten(1).mean(1)


def attack_prompts(
    name: str,
    target: AttackTarget,
    options: AttackOptions,
    plan: Rounds,
    make: Callable[[list[int], torch.Generator], PromptSearch],
    *,
    seed: int,
    progress: Progress | None = None,
    work: Path | None = None,
) -> AttackResult:
    """Attack each of the target's prompts, up to as many as the options ask for.

    A prompt whose picture shows the concept without any attack counts as a success, as published:
    ``ASR = (successes before + successes after) / trials`` (Zhang et al., arXiv 2310.11868, section 5).

    Args:
        name: of the attack.
        target: what is attacked.
        options: its budget.
        plan: rounds and steps.
        make: starts the search of a group, given the rows of the target and a generator.
        seed, progress, work: see :class:`Attack`.
    """
    base = target.base
    meter = Meter(base)
    count = min(options.pictures, len(target.prompts))
    without = _plain(name, target, count, options, meter, progress, work)
    left = [row for row in range(count) if not without[row]]
    details: list[dict[str, Any]] = [
        {
            "prompt": target.prompts[row],
            "attacked": target.prompts[row],
            "seed": target.seeds[row],
            "success": without[row],
            "without": without[row],
            "round": None,
        }
        for row in range(count)
    ]
    groups = [left[k : k + options.batch_size] for k in range(0, len(left), options.batch_size)]
    with base.counter.stage(name), adapters.frozen(*base.components.values()):
        for number, rows in enumerate(groups):
            file = work / f"group-{number:04d}.json" if work else None
            if file and file.exists():
                kept = read_json(file)
                found = list(kept["found"])
                meter.catch_up(kept["meter"])
            else:
                checkpoint = Checkpoint(work / f"group-{number:04d}.checkpoint.safetensors") if work else None

                def tell(done: int, hits: int, number: int = number) -> None:
                    if progress:
                        total = len(groups) * plan.rounds * plan.steps
                        done += number * plan.rounds * plan.steps
                        progress.update(name, done, total, f"{hits} of the group found")

                found = _attack_group(
                    f"{name} {number}", target, rows, plan, make, meter, seed, checkpoint, tell
                )
                if file:
                    write_json(file, {"found": found, "meter": meter.so_far()})
                if checkpoint:
                    checkpoint.path.unlink(missing_ok=True)
            for row, entry in zip(rows, found, strict=True):
                details[row] |= entry

    def draw(some: slice) -> list[Image]:
        return target.draw([one["prompt"] for one in details[some]], target.seeds[some])

    pictures = first_pictures(count, draw, options, meter)
    return AttackResult.of(name, details, meter, options, pictures=pictures)


def _plain(
    name: str,
    target: AttackTarget,
    count: int,
    options: AttackOptions,
    meter: Meter,
    progress: Progress | None,
    work: Path | None,
) -> list[bool]:
    """Which of the attacked prompts show the concept as they are."""
    return judged(
        target,
        f"{name}, plain",
        count,
        lambda some: target.draw(target.prompts[some], target.seeds[some]),
        options,
        meter,
        progress=progress,
        work=work,
    )


def _attack_group(
    stage: str,
    target: AttackTarget,
    rows: list[int],
    plan: Rounds,
    make: Callable[[list[int], torch.Generator], PromptSearch],
    meter: Meter,
    seed: int,
    checkpoint: Checkpoint | None,
    tell: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    search = make(rows, step_generator(seed, f"{stage} start", 0))
    found: list[dict[str, Any]] = [{"success": False} for _ in rows]
    losses: list[float] = []
    first = 0
    if checkpoint and (kept := checkpoint.load([search.parameter], search.optimizer)):
        first, losses, extra = kept
        found = extra["found"]
        meter.catch_up(extra)
    for round_ in range(first, plan.rounds):
        active = [k for k, one in enumerate(found) if not one["success"]]
        if not active:
            break
        total = 0.0
        for k in range(plan.steps):
            step = round_ * plan.steps + k
            loss = search.loss(active, round_, step_generator(seed, stage, step))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{stage}: the loss is {loss.item()} at step {step}")
            search.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            search.optimizer.step()
            search.project()
            total += float(loss.detach()) / len(active)
            tell(step + 1, len(found) - len(active))
        losses.append(round(total / plan.steps, 6))
        texts = search.prompts()
        images = target.draw([texts[k] for k in active], [target.seeds[rows[k]] for k in active])
        for k, hit in zip(active, target.shows(images), strict=True):
            found[k] = {"prompt": texts[k], "success": bool(hit), "round": round_ + 1}
        if checkpoint:
            extra = {"found": found, **meter.so_far()}
            checkpoint.save(round_ + 1, [search.parameter], search.optimizer, losses, extra)
    tell(plan.rounds * plan.steps, sum(one["success"] for one in found))
    # The group's mean loss by round: whether the search got anywhere.
    return [{**one, "losses": losses} for one in found]


def replay_prompts(
    name: str,
    target: AttackTarget,
    saved: AttackResult,
    options: AttackOptions,
    progress: Progress | None = None,
) -> AttackResult:
    """Draw found prompts, and the plain ones they were made from, with another patch.

    Where the attack had stopped before it began, because the plain prompt was enough, that prompt is
    what is drawn.
    """
    meter = Meter(target.base)
    found, plain = saved.prompts, [str(one["attacked"]) for one in saved.details]
    seeds = [int(one["seed"]) for one in saved.details]

    def attacked(some: slice) -> list[Image]:
        return target.draw(found[some], seeds[some])

    without = judged(
        target,
        f"{name}, plain",
        len(seeds),
        lambda some: target.draw(plain[some], seeds[some]),
        options,
        meter,
        progress=progress,
    )
    hits = judged(target, f"{name}, replay", len(seeds), attacked, options, meter, progress=progress)
    details = [
        {**one, "success": hit, "without": before}
        for one, hit, before in zip(saved.details, hits, without, strict=True)
    ]
    pictures = first_pictures(len(seeds), attacked, options, meter)
    return AttackResult.of(name, details, meter, options, pictures=pictures)
