"""What a killed command leaves: nothing half-made, and the same result from the next call.

    python -m benchmarks.kills run                       # all seven commands, fifty moments each
    python -m benchmarks.kills run --command erase --moments 12
    python -m benchmarks.kills table

Each trial forks a process that has the package loaded, in a folder and caches of its own, and lets one fault happen at
a random moment: SIGKILL by the clock; SIGKILL before a random one of its openings, renames and removals of files, which
is where half-made things come from; a disk that is full after a random number of bytes (a tmpfs of that size, where
this user may mount one); or SIGKILL followed by one flipped bit in a random file that the call has left. Then what lies
there must be whole, and the same call, with ``--resume`` where the command has it, must give what an untouched call
gives, or refuse in one sentence. Runs on the bundled base, with few and short steps; POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from recare_patch.core import file_sha256, read_json, read_safetensors_header, write_json
from recare_patch.core.errors import RecarePatchError

RESULTS = Path(__file__).parent / "results" / "kills"
FAULTS = {"clock": 0.3, "files": 0.3, "full disk": 0.2, "bit": 0.2}
"""Share of the moments that each fault has."""

_SHORT = (
    "target_images.count=2 target_images.steps=2 care_set.clustering=false care_set.refinement=false search.rounds=1 "
    "search.erase_steps=3 search.inversion_steps=3 search.batch_size=2 erase.ends=steps erase.steps=22 "
    "erase.batch_size=2 erase.retain_batch_size=2 erase.retained_pairs=1 erase.retained_images=2 "
    "erase.retained_vocabulary=4"
)
_SHORTER = [word for one in _SHORT.split() for word in ("--set", one)]
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Command:
    """What is called, in a folder that holds ``van-gogh-patch`` and ``tench-patch``, and what its result is."""

    call: tuple[str, ...]
    again: tuple[str, ...] = ()
    """What the second call has besides."""
    out: str = "out"
    result: Callable[[Path], Any] = lambda out: _digests(out)
    left: str = "out"
    """Below what a bit flips."""
    finished: str = "weights"
    """The file by which the result is there; all else is then there too."""


def _digests(out: Path) -> dict[str, str]:
    files = [file.relative_to(out) for file in sorted(out.rglob("*")) if file.is_file()]
    # What a run clears away at its end is looked for apart.
    return {file.as_posix(): file_sha256(out / file) for file in files if not set(file.parts) & _CLEARED}


def _without(found: Any, keys: set[str]) -> Any:
    """JSON without what differs from call to call: times and dates."""
    if isinstance(found, dict):
        return {key: _without(one, keys) for key, one in found.items() if key not in keys}
    return [_without(one, keys) for one in found] if isinstance(found, list) else found


_CLEARED = {".run", ".run.done", ".recare-patch.lock"}
_TIMES = {"seconds", "created", "peak_memory_bytes", "fetched", "cost", "time", "stages"}


def _files(out: Path) -> dict[str, Any]:
    """Every file's digest; of those that tell times, and of what quotes their hashes, what they say besides."""
    found: dict[str, Any] = _digests(out)
    for name in list(found):
        if name.endswith(".json"):
            found[name] = _without(json.loads((out / name).read_text(encoding="utf-8")), _TIMES)
        if Path(name).name in ("README.md", "report.html"):
            found[name] = "is there"
    return found


COMMANDS = {
    "erase": Command(
        ("erase", "--concept", "Van Gogh", *_SHORTER, "--out", "out", "--device", "cpu"),
        ("--resume",),
        result=_files,
        finished="pytorch_lora_weights.safetensors",
    ),
    "evaluate": Command(
        ("evaluate", "--patch", "van-gogh-patch", "--pictures", "4", "--metric", "concept-rate", "--out", "out",
         "--cache", "cache", "--device", "cpu"),
        result=_files,
        left=".",
        finished="evidence.json",
    ),
    "attack": Command(
        ("attack", "--patch", "van-gogh-patch", "--attack", "concept-inversion", "--steps", "24", "--pictures", "12",
         "--out", "out", "--device", "cpu"),
        ("--resume",),
        result=_files,
        finished="concept-inversion/attack.json",
    ),
    "stack": Command(("stack", "van-gogh-patch", "tench-patch", "--out", "out"), result=_files,
                     finished="pytorch_lora_weights.safetensors"),
    "merge": Command(("merge", "--patch", "van-gogh-patch", "--out", "out"), result=_files,
                     finished="model_index.json"),
    "pull": Command(("pull", "me/van-gogh", "--out", "out"), result=_files, left=".", finished="hub.json"),
    "push": Command(("push", "van-gogh-patch", "me/pushed"), out="", left="van-gogh-patch"),
}  # fmt: skip


@dataclass
class Trial:
    """One fault and what came of it."""

    fault: str
    moment: float
    first: int = 0
    again: int = 0
    came: str = ""
    """same, refused, or what is wrong."""
    told: str = ""


@dataclass
class World:
    """Where the trials of a command run."""

    name: str
    work: Path
    hub: Any = None
    whole: Any = None
    seconds: float = 0.0
    events: int = 0
    bytes: int = 0

    @property
    def command(self) -> Command:  # noqa: D102
        return COMMANDS[self.name]


def _in_child(call: tuple[str, ...], place: Path, at_event: int | None, count: Path | None) -> None:
    """The command, in this process: a fork. It never returns."""
    code = 0
    try:
        os.setsid()
        log = os.open(place.parent / f"{place.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ["XDG_CACHE_HOME"] = str(place / "user-cache")
        from huggingface_hub import constants

        constants.HF_HUB_CACHE = str(place / "hub")
        seen = 0

        def hook(event: str, given: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in _EVENTS or (event == "open" and not _writes(given)):
                return
            seen += 1
            if seen == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        from recare_patch import cli

        try:
            sys.argv = ["recare-patch", *call]
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        if count is not None:
            count.write_text(str(seen), "ascii")
    except BaseException:  # A fork must not go on in its parent's code.
        traceback.print_exc()
        code = 1
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _writes(given: tuple[Any, ...]) -> bool:
    mode, flags = (*given, None, None)[1:3]
    return any(one in (mode or "") for one in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def call(
    words: tuple[str, ...], place: Path, *, after: float | None = None, at_event: int | None = None,
    count: Path | None = None,
) -> tuple[int, float]:  # fmt: skip
    """Exit status and seconds of a call in a fork; ``-9`` where it was killed ``after`` seconds or at an event."""
    sys.stdout.flush()
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        _in_child(words, place, at_event, count)
    if after is not None:
        timer = threading.Timer(after, lambda: os.kill(pid, signal.SIGKILL))
        timer.start()
        # Not reaped before the timer is over: its number stays its own.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        timer.cancel()
        timer.join()
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def fresh(world: World, place: Path) -> Path:
    """A folder with what the call needs, and a Hub that has seen nothing."""
    if not place.is_mount():
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world.work / "inputs", place, dirs_exist_ok=True)
    place.with_name(f"{place.name}.log").unlink(missing_ok=True)
    _reset_hub(world)
    return place


def _reset_hub(world: World) -> None:
    if world.hub is None:
        return
    world.hub.blobs.clear()
    world.hub.repos.clear()
    source = world.work / "inputs" / "van-gogh-patch"
    if world.name == "pull":
        world.hub.add("me/van-gogh", {file.name: file.read_bytes() for file in sorted(source.iterdir())})


def result_of(world: World, place: Path) -> Any:
    """What the call made; None where it is not there."""
    if world.name == "push":
        repo = world.hub.repos.get("me/pushed")
        return {name: hash(data) for name, data in repo.files.items()} if repo and len(repo.commits) > 1 else None
    out = place / world.command.out
    return world.command.result(out) if (out / world.command.finished).exists() else None


def half_made(world: World, place: Path, *, ended: bool) -> str:
    """What is there and not whole; once a call has ended well nothing of its own may be left beside the result."""
    for file in sorted(place.rglob("*")):
        parts = file.relative_to(place).parts
        # The client of the Hub keeps what it has not fetched wholly under a name that says so.
        if parts[0] in ("hub", "user-cache") or not file.is_file():
            continue
        if any(part.startswith(".") and part.endswith(".part") for part in parts):
            if ended:
                return f"{'/'.join(parts)} is left"
            continue
        if ended and _CLEARED & set(parts):
            return f"{'/'.join(parts)} is left"
        try:
            if file.suffix == ".json":
                read_json(file, file.name, RecarePatchError)
            elif file.suffix == ".safetensors":
                read_safetensors_header(file)
            elif file.suffix == ".png":
                with Image.open(file) as picture:
                    picture.load()
        except (RecarePatchError, OSError, ValueError) as fault:
            return f"{'/'.join(parts)} is half: {fault}"
    found = result_of(world, place)
    if found is not None and found != world.whole:
        return f"a result that is not whole: {_differing(found, world.whole)}"
    return ""


def _differing(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        apart = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        return ", ".join(f"{key} ({_differing(one.get(key), other.get(key))})" for key in apart)
    return f"{one!s:.80} for {other!s:.80}"


def settle(world: World, place: Path, trial: Trial, *, half: bool = True) -> Trial:
    """After the fault: look, call again, look at what came of it."""
    log = place.with_name(f"{place.name}.log")
    if half and (wrong := half_made(world, place, ended=False)):
        trial.came = f"after the fault {wrong}"
        return trial
    size = log.stat().st_size if log.exists() else 0
    trial.again, _ = call((*world.command.call, *world.command.again), place)
    told = log.read_bytes()[size:].decode("utf-8", "replace")
    lines = [line for line in told.splitlines() if line.startswith("Error: ")]
    trial.told = lines[-1] if lines else ""
    if "Traceback" in told or trial.again not in (0, 2):
        trial.came = f"exit {trial.again}: {told[-2000:]}"
        return trial
    found = result_of(world, place)
    same = found is not None and found == world.whole
    if trial.again == 2 and not same:
        trial.came = "refused" if found is None and trial.fault == "bit" else f"refused: {trial.told}"
    elif not same:
        trial.came = f"another result: {_differing(found, world.whole)}"
    elif wrong := half_made(world, place, ended=True):
        trial.came = wrong
    else:
        trial.came = "same"
    return trial


def killed(world: World, place: Path, rng: random.Random, trial: Trial) -> bool:
    """Let a call be killed at the trial's moment; False where it had ended before."""
    if trial.fault == "files" or (trial.fault == "bit" and rng.random() < 0.5):
        trial.moment = rng.randint(1, max(1, world.events))
        trial.first, _ = call(world.command.call, place, at_event=int(trial.moment))
    else:
        trial.moment = round(rng.uniform(0, world.seconds), 3)
        trial.first, _ = call(world.command.call, place, after=trial.moment)
    return trial.first == -9


def one_trial(world: World, fault: str, rng: random.Random, number: int) -> Trial | None:
    """One fault; None where the moment came too late, or the call left nothing that a bit could flip in."""
    trial = Trial(fault, 0.0)
    if fault == "full disk":
        return _full_disk(world, rng, number, trial)
    place = fresh(world, world.work / f"{world.name}-{number}")
    if not killed(world, place, rng, trial):
        return None
    if fault == "bit":
        if world.name == "push":
            # It keeps nothing; the bit flips in what it sends. Nobody can know the words of a card.
            files = [*(place / world.command.left).glob("*.safetensors"), place / world.command.left / "recipe.yaml"]
        elif world.name in ("stack", "merge"):
            # They keep nothing that the next call reads: only what they were about to write is there.
            files = [file for file in place.rglob("*") if ".part" in file.as_posix()]
        else:
            files = list((place / world.command.left).rglob("*"))
        inputs = {one.relative_to(world.work / "inputs") for one in (world.work / "inputs").rglob("*")}
        files = [file for file in files if file.is_file() and not file.is_symlink() and file.stat().st_size]
        if world.name != "push":
            files = [file for file in files if file.relative_to(place) not in inputs]
        if not files:
            return None
        file = rng.choice(sorted(files))
        data = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        trial.told = file.relative_to(place).as_posix()
    made = settle(world, place, trial, half=fault != "bit")
    if made.came in ("same", "refused"):
        shutil.rmtree(place)
    return made


@contextmanager
def _disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes, which can be given more."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield (
            lambda more: (
                subprocess.run(["mount", "-o", f"remount,size={more}", str(place)], check=True, capture_output=True)
                and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def _full_disk(world: World, rng: random.Random, number: int, trial: Trial) -> Trial | None:
    disk = world.work / f"{world.name}-{number}"
    inputs = sum(file.stat().st_size + 4096 for file in (world.work / "inputs").rglob("*"))
    room = rng.randrange(4096, max(8192, world.bytes))
    trial.moment = room
    with _disk(disk, inputs + 65536 + room) as grow:
        place = fresh(world, disk)
        trial.first, _ = call(world.command.call, place)
        if trial.first == 0:
            return None
        told = place.with_name(f"{place.name}.log").read_text(encoding="utf-8", errors="replace")
        grow(4 * (inputs + world.bytes) + 2**26)
        if trial.first != 2 or "Traceback" in told:
            trial.came = f"exit {trial.first} on a full disk: {told[-2000:]}"
            return trial
        return settle(world, place, trial)


def measure(world: World) -> None:
    """One call without a fault: its result, its time, its events and the bytes that it needs."""
    place, count = fresh(world, world.work / "whole"), world.work / "events"
    peak, over = 0, threading.Event()
    inputs = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            total = 0
            for file in place.rglob("*"):
                try:
                    total += file.stat().st_size if file.is_file() else 0
                except OSError:
                    continue
            peak = max(peak, total - inputs)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code, world.seconds = call(world.command.call, place, count=count)
    over.set()
    watcher.join()
    log = place.with_name("whole.log").read_text(encoding="utf-8", errors="replace")
    if code != 0:
        raise SystemExit(f"{world.name} does not run at all (exit {code}):\n{log[-3000:]}")
    world.whole, world.events, world.bytes = result_of(world, place), int(count.read_text("ascii")), peak
    if world.whole is None:
        raise SystemExit(f"{world.name} made nothing:\n{log[-3000:]}")
    if wrong := half_made(world, place, ended=True):
        raise SystemExit(f"{world.name}, without a fault: {wrong}")
    shutil.rmtree(place)


def may_mount(work: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    try:
        with _disk(work / "disk", 2**20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def make_inputs(work: Path) -> None:
    """The patches that the commands work on."""
    inputs = work / "inputs"
    for concept, name in (("Van Gogh", "van-gogh-patch"), ("tench", "tench-patch")):
        if not (inputs / name / "pytorch_lora_weights.safetensors").exists():
            inputs.mkdir(parents=True, exist_ok=True)
            words = ("erase", "--concept", concept, "--method", "uce", "--out", name, "--device", "cpu")
            if (code := call(words, inputs)[0]) != 0:
                raise SystemExit(f"cannot make {name} (exit {code}): see {inputs}.log")
            shutil.rmtree(inputs / "user-cache", ignore_errors=True)


def run(name: str, moments: int, work: Path, seed: int, hub: Any) -> dict[str, Any]:
    """All trials of a command."""
    world, rng = World(name, work, hub), random.Random(f"{seed} {name}")
    measure(world)
    shares = dict(FAULTS)
    mounts = may_mount(work)
    if not mounts:
        shares["clock"] += shares.pop("full disk")
    wanted = [fault for fault, share in shares.items() for _ in range(round(share * moments))][:moments]
    trials: list[Trial] = []
    never: set[str] = set()
    for number, fault in enumerate(wanted):
        # What came too late is no moment of this call: another is drawn. What never comes (a command that writes
        # nothing fills no disk) gives its moments to the clock.
        for attempt in range(24):
            kind = "clock" if fault in never or attempt > 11 else fault
            if (trial := one_trial(world, kind, rng, number)) is not None:
                trials.append(trial)
                break
            if attempt == 11:
                never.add(fault)
        done = trials[-1] if trials else None
        print(f"{name} {number + 1}/{len(wanted)} {fault}: {done and (done.came, done.told)}", flush=True)
    return {
        "command": name, "seed": seed, "seconds": round(world.seconds, 2), "events": world.events,
        "bytes": world.bytes, "mounts": mounts, "trials": [vars(one) for one in trials],
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a command."""
    lines = [
        "| command | moments | by the clock | at a file | full disk | flipped bit | same result | refused | wrong |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in COMMANDS:
        if name not in found:
            continue
        trials = found[name]["trials"]
        kinds = [str(sum(one["fault"] == fault for one in trials) or "–") for fault in FAULTS]
        same, refused = (sum(one["came"] == what for one in trials) for what in ("same", "refused"))
        row = [f"`{name}`", str(len(trials)), *kinds, str(same), str(refused), str(len(trials) - same - refused)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--command", choices=list(COMMANDS), action="append")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("kills-work"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        _run_all(arguments)
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in arguments.results.glob("*.json")}
    print(table(found))
    wrong = [one for each in found.values() for one in each["trials"] if one["came"] not in ("same", "refused")]
    sys.exit(1 if wrong else 0)


def _run_all(arguments: argparse.Namespace) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    from tests.share.hub_stand_in import TOKEN, HubStandIn

    work = arguments.work.absolute()
    with ExitStack() as stack:
        hub = stack.enter_context(HubStandIn().running())
        # A client that was killed in the middle of a request is no fault of the server's.
        hub._server.handle_error = lambda *_: None
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
        # Loaded once, before any fork: a trial is then as long as its work.
        import diffusers  # noqa: F401
        import torch

        from recare_patch.models import load_base

        torch.set_num_threads(1)
        load_base("atelier", device="cpu")
        make_inputs(work)
        for name in arguments.command or list(COMMANDS):
            made = run(name, arguments.moments, work, arguments.seed, hub if name in ("push", "pull") else None)
            write_json(arguments.results / f"{name}.json", made)


if __name__ == "__main__":
    main()
