"""The command line: a group of commands a file.

Nothing here imports torch, or anything that does, before a command needs it: ``--help`` answers at
once. Errors of this package become one line on standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from recare_patch import __version__
from recare_patch.cli.patches import HUB_PREFIX as HUB_PREFIX
from recare_patch.cli.patches import base_of as base_of
from recare_patch.cli.patches import parse_patch as parse_patch
from recare_patch.cli.patches import several_concepts as several_concepts
from recare_patch.cli.patches import short_patch as short_patch
from recare_patch.core import RecarePatchError, RecipeError, Registry, nearest, one_of, output_error, unknown_name
from recare_patch.recipe import PRECISIONS, MemoryOptions, Recipe, parse_assignment

if TYPE_CHECKING:
    from recare_patch.core import RichProgress

Command = TypeVar("Command", bound=Callable[..., Any])

SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MOST_SEED = 2**63 - 1
SEED = click.IntRange(0, MOST_SEED)

_FILES = {
    "erase": "erase plan",
    "doctor": "doctor",
    "measure": "evaluate attack verify",
    "audit": "audit",
    "stack": "stack scale merge unmerge",
    "patch": "inspect convert generate",
    "share": "push pull search index",
    "lists": "methods recipes careset atelier",
    "suites": "suites",
    "demo": "demo",
}
COMMANDS = Registry(
    "command", {name: f"recare_patch.cli.{file}:{name}" for file, names in _FILES.items() for name in names.split()}
)

_SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


_PLACES = re.compile(r"\b(FOLDER|DIR|FILE|PATCH)\b")
"""In what stands for an option's value in the help: the value may be a path."""


def _at_home(kind: Any, text: str) -> str:
    """A path with its ``~`` expanded: no shell does that behind ``--out=``, and none in quotes."""
    found = os.path.expanduser(text)  # noqa: PTH111 - Path's own raises where there is no home
    if found == text and text.startswith("~") and not os.path.lexists(text):
        kind.fail(f"there is no home folder for '{text.split('/')[0]}': write the whole path, or ./{text}")
    return found


class FilePath(click.Path):
    """A path, with ``~`` for the home folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return super().convert(_at_home(self, os.fspath(value)), param, ctx)


class Text(click.types.StringParamType):
    """Words; what a terminal sent in another encoding than the locale's is refused, as it is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        text = super().convert(value, param, ctx)
        if any("\ud800" <= one <= "\udfff" for one in text):
            self.fail(f"{text!a} is not text in this locale's encoding, {sys.getfilesystemencoding()}")
        return text


class Place(click.types.StringParamType):
    """A path or something else, such as a hub id or a path with a scale behind it; ``~`` as in a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return _at_home(self, super().convert(value, param, ctx))


FOLDER = FilePath(path_type=Path)
TEXT, PLACE = Text(), Place()


class _Commands(click.Group):
    """A group that imports a command when it is called, and whose commands fail with one sentence."""

    def main(self, *args: Any, **options: Any) -> Any:
        # A terminal or log that is not UTF-8 shows escapes: no reason to end in the middle of a queue.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS.names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS.get(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            guess = nearest(args[0], names)
            hint = f"; did you mean '{guess}'?" if guess else ""
            ctx.fail(f"unknown command '{args[0]}': there are {', '.join(names)}{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        code = 2
        try:
            return super().invoke(ctx)
        except RecarePatchError as fault:
            sentence = str(fault)
        except KeyboardInterrupt:
            called = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = called is not None and any(one.name == "resume" for one in called.params)
            sentence = "interrupted; a run that was under way goes on with --resume" if resumes else "interrupted"
            code = 130
        except OSError as fault:
            # Libraries write files of their own: a full disk there is no bug either.
            if fault.errno not in _SYSTEM_FAULTS:
                raise
            sentence = str(output_error(fault.filename or "a file", fault))
        except UnicodeEncodeError as fault:
            if fault.encoding != sys.getfilesystemencoding():
                raise
            sentence = (
                f"names of files are {fault.encoding} in this locale, and '{fault.object}' has other letters: set "
                "PYTHONUTF8=1, or choose a UTF-8 locale"
            )
        except RuntimeError as fault:
            # Named by class, since torch is not imported here.
            if type(fault).__name__ != "OutOfMemoryError":
                raise
            sentence = _memory_is_full(ctx, fault)
        click.echo(f"Error: {sentence}", err=True)
        ctx.exit(code)


def _memory_is_full(ctx: click.Context, fault: RuntimeError) -> str:
    """At what the memory ran out, and an option of the command that makes it take less."""
    name = ctx.invoked_subcommand or ""
    options = _options_of(ctx.command.get_command(ctx, name)) if isinstance(ctx.command, click.Group) else set()
    notes: list[str] = getattr(fault, "__notes__", [])
    where = f" at {', '.join(reversed(notes))}" if notes else ""
    given = ctx.meta.get(_VRAM)
    if "--vram" in options:
        remedy = "--vram with less than it has" if given is None else f"a smaller --vram than {given:g}"
    else:
        remedy = "--device cpu" if "--device" in options else "again when other programs have freed it"
    plan = " (`recare-patch plan` tells what it takes)" if name == "erase" else ""
    return f"the accelerator's memory is full{where}; try {remedy}{plan}"


def _options_of(command: click.Command | None) -> set[str]:
    """The options of a command, or of all commands of a group."""
    if command is None:
        return set()
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return {name for one in command.params for name in one.opts}.union(*map(_options_of, inner))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(__version__, prog_name="recare-patch")
def cli() -> None:
    """Erase a concept from a diffusion model and keep what belongs to other pictures too.

    \b
    The result is a LoRA patch of a megabyte or less that plain diffusers loads:
      recare-patch erase --concept "Van Gogh"
      recare-patch generate --patch van-gogh-patch --prompt "a starry night by Van Gogh"
    """


def main() -> None:
    """The console script."""
    cli(prog_name="recare-patch")


def option(
    spec: str, help: str, type: Any = None, default: Any = None, *, into: str | None = None, **more: Any
) -> Callable[[Command], Command]:
    """A ``click.option``, told in a line: ``option("--out DIR", "The folder.", FOLDER)``.

    Its name comes with what stands for its value in the help; ``into`` is the parameter that gets it.
    """
    name, _, metavar = spec.partition(" ")
    if type is None and not isinstance(default, bool):
        type = PLACE if _PLACES.search(metavar) else TEXT
    more |= {} if default is None else {"default": default}
    return click.option(name, *filter(None, [into]), metavar=metavar or None, type=type, help=help, **more)


def flag(name: str, help: str, into: str | None = None) -> Callable[[Command], Command]:
    """An option without a value."""
    return click.option(name, *filter(None, [into]), is_flag=True, help=help)


base_option = option(
    "--base FOLDER|HUB-ID", f"Base model: a diffusers pipeline folder or a hub id, such as {SD_15}.  [default: bundled]"
)
clip_option = option(
    "--clip FOLDER|HUB-ID",
    "A transformers CLIP model with tokenizer and image processor.  [default: what fits the base]",
)
concept_option = option("--concept TEXT", "One of several that the patch erases.  [default: each of them]")
device_option = option("--device", "auto, cpu, cuda, cuda:1, mps, …", None, "auto")
formats_option = option(
    "--formats NAME,…",
    "Weight files: diffusers is the patch, kohya is for A1111 and ComfyUI.",
    None,
    "diffusers,kohya",
    into="file_formats",
)
json_option = flag("--json", "Print JSON.", "as_json")


def set_option(help: str = "any recipe key, such as erase.guidance_minus=2") -> Callable[[Command], Command]:
    """Add the repeatable ``--set``."""
    return option("--set KEY=VALUE", f"Set {help}; repeatable.", into="assignments", multiple=True)


class NamesOption(click.Option):
    """A repeatable option of names from a table of ``recare_patch.measure``, looked up when it is needed."""

    def __init__(self, *declared: Any, table: str, extra: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*declared, callback=self._check, **(options | {"multiple": True}))
        self.table, self.extra = table, extra

    def _names(self) -> tuple[str, ...]:
        from recare_patch import measure

        table: Any = getattr(measure, self.table)
        return (*table, *self.extra)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:  # noqa: D102
        self.help = (self.help or "").format(names=" | ".join(self._names()))
        return super().get_help_record(ctx)

    def _check(self, ctx: click.Context, _: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name.strip().casefold() not in self._names():
                raise unknown_name(self.opts[0].lstrip("-"), name, self._names())
        return given


_GIVEN, _VRAM = f"{__name__}.given", f"{__name__}.vram"


def recipe_option(key: str, name: str, default: str | None = None, **options: Any) -> Callable[[Command], Command]:
    """An option that sets a recipe key: its type, names and help are those of the key's field.

    The command is not given its value: :func:`overrides_from` has it, under the key.

    Args:
        key: dotted, such as "erase.steps".
        name: the option's name, such as "--steps".
        default: what is told of it in place of the field's own; nothing where it is empty.
        options: of ``click.option``; ``help`` in place of the field's description.
    """
    model: Any = Recipe
    *sections, last = key.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[last]
    kind: Any
    kind, names = _kind_and_names(field.annotation, field.metadata)
    # Descriptions name the tables whose names are listed here.
    told = re.sub(r",? ?a name of [A-Z_]+", "", options.pop("help", None) or field.description or "")
    told = " | ".join(names) + (": " if names and told else "") + (told if names else told[:1].upper() + told[1:])
    shown = default if default is not None else "" if field.default is None else str(field.default)
    told += "." if told else ""
    if kind is bool:
        options |= {"is_flag": True, "flag_value": True}
    else:
        told += f"  [default: {shown}]" if shown else ""
        options = {"metavar": ("NAME" if names else "TEXT") if kind is str else None} | options

    def remember(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.meta.setdefault(_GIVEN, {})[key] = value

    if kind is str:
        kind = PLACE if _PLACES.search(options["metavar"]) else TEXT
    return click.option(name, type=kind, default=None, callback=remember, expose_value=False, help=told, **options)


def _kind_and_names(annotation: Any, metadata: Sequence[Any]) -> tuple[type, Sequence[str]]:
    """The type that a field's value has on the command line, and the names that it is one of."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *metadata = typing.get_args(annotation)
    checks = [getattr(one, "func", None) for one in metadata]
    names = next((one.names for one in checks if isinstance(one, one_of)), ())
    return annotation if annotation in (bool, int, float) else str, names


def memory_options(command: Command) -> Command:
    """Add ``--vram`` and an option for each key of a recipe's ``memory``."""
    section: Any = Recipe.model_fields["memory"].annotation
    metavars = {"micro_batch": "N", "resolution": "WxH", "weights": "FORM"}
    for key in reversed(section.model_fields):
        more = {"metavar": metavars[key]} if key in metavars else {}
        command = recipe_option(f"memory.{key}", f"--{key.replace('_', '-')}", "", **more)(command)
    size = click.FloatRange(min=0, min_open=True)
    told = "Choose the switches below for a card of this size, such as 6, 8, 12 or 24."

    def remember(ctx: click.Context, _: click.Parameter, value: float | None) -> float | None:
        # Of all contexts of a call, so that the group knows it when memory runs out.
        ctx.meta[_VRAM] = value
        return value

    return option("--vram GB", told, size, callback=remember)(command)


def drawing_options(command: Command) -> Command:
    """Add ``--precision`` and :func:`memory_options` to a command that draws, or attacks; see :func:`given_memory`."""
    told = f"{' | '.join(PRECISIONS)}.  [default: the recipe's on a GPU, fp32 on the CPU]"
    return option("--precision NAME", told, callback=_known_precision)(memory_options(command))


def _known_precision(ctx: click.Context, _: click.Parameter, given: str | None) -> str | None:
    if given not in (None, *PRECISIONS):
        raise unknown_name("precision", given, PRECISIONS)
    return given


def given_memory() -> MemoryOptions:
    """The levers that were given by the options of :func:`memory_options`."""
    named = given_options().items()
    return MemoryOptions(**{key.removeprefix("memory."): value for key, value in named if key.startswith("memory.")})


def given_options() -> dict[str, Any]:
    """Recipe key → value of the options made by :func:`recipe_option` that were given."""
    return dict(click.get_current_context().meta.get(_GIVEN, {}))


def overrides_from(assignments: Sequence[str], named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides of ``--set`` and of options with names of their own; None where one was not given.

    Args:
        assignments: what ``--set`` was given.
        named: dotted key → value; those of :func:`given_options` by default.

    Raises:
        RecipeError: an assignment is malformed, or sets a key that an option sets otherwise.
    """
    named = given_options() if named is None else named
    found = {key: value for key, value in named.items() if value is not None}
    for text in assignments:
        key, value = parse_assignment(text)
        if found.setdefault(key, value) != value:
            raise RecipeError(f"{key} is set twice, to {found[key]!r} and to {value!r}")
    return found


def table_lines(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows in columns, the first ones flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        line = [cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(cells)]
        found.append("  ".join(line).rstrip())
    return found


def echo_table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows in columns; see :func:`table_lines`."""
    for line in table_lines(rows, left):
        click.echo(line)


@contextlib.contextmanager
def shown_progress() -> Iterator[RichProgress]:
    """Progress bars on standard error, the package's log lines above them, other libraries quiet."""
    from recare_patch.core import RichProgress

    quiet_libraries()
    log = logging.getLogger("recare_patch")
    handler, level = _EchoHandler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with RichProgress() as progress:
            yield progress
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _EchoHandler(logging.Handler):
    """Log records as plain lines on standard error; warnings say that they are warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + record.getMessage(), err=True)


def quiet_libraries() -> None:
    """Keep the model libraries' own bars and notices off the terminal; their errors still come."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It warns of a 4-bit kernel that it misses on CPUs, and nothing here computes in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
