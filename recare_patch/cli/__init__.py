"""The command line: one short file a command.

No file here imports torch, or anything that does, before a command needs it: ``--help`` answers at
once. Errors of this package become one line on standard error and exit code 2.
"""

from __future__ import annotations

import errno
from typing import Any

import click

from recare_patch import __version__
from recare_patch.cli.atelier import atelier
from recare_patch.cli.attack import attack
from recare_patch.cli.careset import careset
from recare_patch.cli.convert import convert
from recare_patch.cli.demo import demo
from recare_patch.cli.erase import erase
from recare_patch.cli.evaluate import evaluate
from recare_patch.cli.generate import generate
from recare_patch.cli.index import index
from recare_patch.cli.inspect import inspect
from recare_patch.cli.merge import merge, unmerge
from recare_patch.cli.methods import methods
from recare_patch.cli.plan import plan
from recare_patch.cli.pull import pull
from recare_patch.cli.push import push
from recare_patch.cli.recipes import recipes
from recare_patch.cli.search import search
from recare_patch.cli.stack import stack
from recare_patch.cli.verify import verify
from recare_patch.core import RecarePatchError, nearest, output_error

_SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class _Commands(click.Group):
    """A group whose commands fail with one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RecarePatchError as fault:
            _fail(ctx, str(fault), 2)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; a run that was under way goes on with --resume", 130)
        except OSError as fault:
            # Libraries write files of their own: a full disk there is no bug either.
            if fault.errno not in _SYSTEM_FAULTS:
                raise
            _fail(ctx, str(output_error(fault.filename or "a file", fault)), 2)
        except RuntimeError as fault:
            # Named by class, since torch is not imported here.
            if type(fault).__name__ != "OutOfMemoryError":
                raise
            _fail(
                ctx,
                "the accelerator's memory is full; try --vram with less than it has (`recare-patch plan` "
                "tells what a run takes)",
                2,
            )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            guess = nearest(args[0], names)
            hint = f"; did you mean '{guess}'?" if guess else ""
            ctx.fail(f"unknown command '{args[0]}': there are {', '.join(names)}{hint}")
        return super().resolve_command(ctx, args)


def _fail(ctx: click.Context, sentence: str, code: int) -> None:
    click.echo(f"Error: {sentence}", err=True)
    ctx.exit(code)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="recare-patch")
def cli() -> None:
    """Erase a concept from a diffusion model and keep what belongs to other pictures too.

    \b
    The result is a LoRA patch of a megabyte or less that plain diffusers loads:
      recare-patch erase --concept "Van Gogh"
      recare-patch generate --patch van-gogh-patch --prompt "a starry night by Van Gogh"
    """


for _command in (
    erase,
    plan,
    careset,
    generate,
    demo,
    evaluate,
    attack,
    verify,
    stack,
    merge,
    unmerge,
    convert,
    push,
    pull,
    search,
    index,
    inspect,
    methods,
    recipes,
    atelier,
):
    cli.add_command(_command)


def main() -> None:
    """The console script."""
    cli(prog_name="recare-patch")


__all__ = ["cli", "main"]
