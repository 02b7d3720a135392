"""What the attacks that look for a prompt share: improve, draw, look, and stop at the first success.

Prompts are worked on in groups, all of a group in one batch; what one draws and learns does not
depend on the others. What is drawn is the found *text*, read by the tokenizer as anybody's prompt
would be, so that a saved attack is a list of prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import told_at
from recare_patch.erasure import Checkpoint, step_generator
from recare_patch.measure.attacks.protocol import Attack, AttackRun, AttackTarget, Options, Trial
from recare_patch.models import LossScale, check_trained
from recare_patch.models import lora as adapters

if TYPE_CHECKING:
    from recare_patch.models import BaseModel


class Vocabulary:
    """The tokens that may stand in a found prompt: ``ids`` ``[tokens]``, ``vectors`` ``[tokens, width]``.

    Start and end, pieces of words and bytes of letters are left out: written down and read again they
    become other tokens, and what was found would not be what is drawn. ``table`` has the vectors of all.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.table = base.token_table()
        plain = (k for k in range(len(self.table)) if k not in base.special_token_ids)
        self.ids = torch.tensor([k for k in plain if base.token_ids(base.token_text([k])) == [k]])
        self.vectors = self.table[self.ids.to(self.table.device)]

    def text(self, tokens: Tensor) -> str:
        """The text of token ids."""
        return self.base.token_text(tokens.tolist())

    def of_text(self, text: str) -> Tensor:
        """The vectors of a text's tokens, ``[tokens, token_width]``."""
        return self.table[torch.tensor(self.base.token_ids(text), dtype=torch.long, device=self.table.device)]


class Group(ABC):
    """Some of the target's prompts, for each of which another one is being found."""

    parameter: nn.Parameter
    """What is learnt, its first axis the group's prompts."""
    optimizer: torch.optim.Optimizer

    def __init__(
        self, target: AttackTarget, vocabulary: Vocabulary, rows: list[int], options: Any, draws: torch.Generator
    ) -> None:
        self.target, self.vocabulary, self.rows = target, vocabulary, rows
        self.texts = [target.prompts[row] for row in rows]
        self.begin(options, draws)

    @abstractmethod
    def begin(self, options: Any, generator: torch.Generator) -> None:
        """Set parameter and optimizer."""

    @abstractmethod
    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        """The sum of the losses of some of the group's prompts; draws are made for all of them."""

    @abstractmethod
    def prompts(self) -> list[str]:
        """The text of each prompt as it stands."""

    def project(self) -> None:  # noqa: B027
        """Bring the parameter back to where it may be, after a step."""

    def pictures(self, rows: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean latents of some of the group's target pictures, and noise to add."""
        clean = self.target.latents[[self.rows[row] for row in rows]]
        noise = torch.randn((len(self.rows), *clean.shape[1:]), generator=generator)
        return clean, noise[rows].to(clean)


def prediction_errors(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row, ``[rows]``."""
    return F.mse_loss(predicted.float(), wanted.float(), reduction="none").flatten(1).mean(1)


class PromptAttack(Attack[Options]):
    """An attack in rounds, each of some steps of an optimiser and then a picture of every prompt.

    Success is a picture of a found prompt, at the plain one's seed, that shows the concept after any round,
    or of the plain prompt without an attack, as published: ``ASR = (successes before + successes after) /
    trials`` (Zhang et al., arXiv 2310.11868, section 5).
    """

    group: ClassVar[type[Group]]

    @abstractmethod
    def rounds(self, options: Options) -> tuple[int, int]:
        """How many rounds there are, and the steps of each."""

    def search(self, run: AttackRun[Options], trials: list[Trial]) -> dict[str, Tensor]:
        """Find a prompt for each trial that needs one."""
        for one in trials:
            one |= {"success": one["without"], "round": None}
        left = [row for row, one in enumerate(trials) if not one["without"]]
        size, vocabulary = run.options.batch_size, Vocabulary(run.target.base)
        groups = [left[k : k + size] for k in range(0, len(left), size)]
        with adapters.frozen(*run.target.base.components.values()):
            for number, rows in enumerate(groups):
                find = partial(self._find, run, vocabulary, number, groups)
                for row, entry in zip(rows, run.once(f"group-{number:04d}", find), strict=True):
                    trials[row] |= entry
        return {}

    def _find(
        self, run: AttackRun[Options], vocabulary: Vocabulary, number: int, groups: list[list[int]]
    ) -> list[Trial]:
        rows, stage, target = groups[number], f"{self.name} {number}", run.target
        rounds, steps = self.rounds(run.options)
        starting = step_generator(run.seed, f"{stage} start", 0)
        group = self.group(target, vocabulary, rows, run.options, starting)
        first, scaling = 0, LossScale(target.base.dtype)
        found: list[Trial] = [{"success": False} for _ in rows]
        losses: list[float] = []

        def tell(done: int) -> None:
            all_steps, hits = rounds * steps, sum(one["success"] for one in found)
            done, total = number * all_steps + done, len(groups) * all_steps
            run.progress.update(self.name, done, total, f"{hits} of the group found")

        checkpoint = None
        if run.work:
            checkpoint = Checkpoint(run.work / f"group-{number:04d}.checkpoint.safetensors")
            if kept := checkpoint.load([group.parameter], group.optimizer):
                first, losses, extra = kept
                found = extra["found"]
                run.catch_up(extra)
        for round_ in range(first, rounds):
            active = [k for k, one in enumerate(found) if not one["success"]]
            if not active:
                break
            total = 0.0
            for step in range(round_ * steps, (round_ + 1) * steps):
                with told_at(f"{stage}, step {step + 1}"):
                    loss = group.loss(active, round_, step_generator(run.seed, stage, step))
                    if scaling.backward(loss, [group.parameter]):
                        group.optimizer.step()
                        group.project()
                    check_trained([group.parameter], scaling.dtype)
                total += float(loss.detach()) / len(active)
                tell(step + 1)
            losses.append(round(total / steps, 6))
            texts = group.prompts()
            images = target.draw([texts[k] for k in active], [target.seeds[rows[k]] for k in active])
            for k, hit in zip(active, target.shows(images), strict=True):
                found[k] = {"prompt": texts[k], "success": bool(hit), "round": round_ + 1}
            if checkpoint:
                extra = {"found": found, **run.spent()}
                checkpoint.save(round_ + 1, [group.parameter], group.optimizer, losses, extra, scaling=scaling)
        tell(rounds * steps)
        # The group's mean loss by round: whether the search got anywhere.
        return [{**one, "losses": losses} for one in found]
