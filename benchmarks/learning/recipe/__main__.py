"""Trains a network of the paper by the recipe of its authors, or a baseline to compare it with.

    python -m benchmarks.learning.recipe cifar100-resnet18 --data-root DIR
    torchrun --nproc-per-node 2 -m benchmarks.learning.recipe cifar100-resnet18 --data-root DIR

After each epoch, `last.pt` and, if it is the best so far, `best.pt` are written to the folder --out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from ...common import device_of, parser_of
from .data import samples_of
from .presets import BASELINES, CHOICES, PRESETS, PUBLISHED, Settings
from .training import Options, Training, checkpoint_of, settings_in

console = Console(highlight=False)


def integer_from(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def arguments_of() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = parser_of("benchmarks.learning.recipe", str(__doc__), "device")
    parser.add_argument("preset", choices=PRESETS, help=f"the authors' own commands: {' and '.join(PUBLISHED)}")
    data, start = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    data.add_argument("--data-root", type=Path, metavar="DIR", help="folder that contains the data")
    data.add_argument(
        "--synthetic", type=integer_from(2), metavar="N", help="train on N generated samples of the same shapes instead"
    )
    parser.add_argument("--baseline", choices=BASELINES, help="fixed width, learned without noise, and others")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for checkpoints (default: runs/PRESET[-BASELINE])"
    )
    start.add_argument("--resume", action="store_true", help="continue from last.pt in --out, if it exists")
    start.add_argument(
        "--evaluate",
        type=Path,
        metavar="FILE",
        help="only test a checkpoint, of this program or of the authors', with its settings",
    )
    parser.add_argument("--amp", action="store_true", help="compute under autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the network by torch.compile")
    parser.add_argument("--recompute-spikes", action="store_true", help="use less memory: asgl_cuda.recompute_spikes")
    parser.add_argument(
        "--workers",
        type=integer_from(0),
        default=min(8, os.cpu_count() or 1),
        help="processes that read data (default: %(default)s)",
    )
    group = parser.add_argument_group("settings", "replace those of the preset, or of the checkpoint to test")
    for name, value in asdict(PRESETS[PUBLISHED[0]]).items():
        if name not in ("data", "network", "widths"):  # by preset and baseline
            kind: dict[str, Any] = {"choices": CHOICES[name]} if name in CHOICES else {"type": type(value)}
            if isinstance(value, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            group.add_argument(f"--{name.replace('_', '-')}", **kind)
    return parser, parser.parse_args()


def settings_of(arguments: argparse.Namespace, base: Settings) -> Settings:
    """The settings `base` with the changes of the baseline and of the arguments."""
    given = {name: value for name, value in vars(arguments).items() if value is not None and name in asdict(base)}
    return replace(base, **{**BASELINES.get(arguments.baseline, {}), **given})


def run(training: Training, out: Path) -> None:
    bar = partial(track, console=console, transient=True, disable=training.rank > 0 or not console.is_terminal)
    while training.epoch < training.settings.epochs:
        started, head = time.perf_counter(), f"epoch {training.epoch + 1}/{training.settings.epochs}"
        loss = training.train_epoch(partial(bar, description=head))
        if training.rank > 0:  # the others wait in their next step
            continue
        accuracy = training.accuracy()
        better, training.best = accuracy > training.best, max(accuracy, training.best)
        for name in ("last.pt", "best.pt") if better else ("last.pt",):
            training.save(out / name)
        seconds = time.perf_counter() - started
        console.print(f"{head}: loss {loss:.4f}, test accuracy {accuracy:.2f} %, {seconds:.0f} s")


def main() -> int:
    """Trains a network, or tests a checkpoint."""
    parser, arguments = arguments_of()
    device, base = device_of(parser, arguments.device), PRESETS[arguments.preset]
    tested = None if arguments.evaluate is None else checkpoint_of(arguments.evaluate, device)
    try:
        settings = settings_of(arguments, base if tested is None else settings_in(tested, base))
    except ValueError as error:
        parser.error(str(error))
    out = arguments.out or Path("runs") / "-".join(filter(None, (arguments.preset, arguments.baseline)))
    if "RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    options = Options(device, arguments.amp, arguments.compile, arguments.recompute_spikes, arguments.workers)
    training = Training(settings, samples_of(settings, arguments.data_root, arguments.synthetic), options)
    if tested is not None:
        training.load_network(tested)
        console.print(f"test accuracy {training.accuracy():.2f} %")
        return 0
    last = out / "last.pt"
    if last.exists():
        if not arguments.resume:
            parser.error(f"{last} is there: --resume goes on from it, --out names another folder")
        training.resume(last)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    if not os.access(out, os.W_OK):
        parser.error(f"--out {out} cannot be written to")
    try:
        run(training, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([f"--resume goes on from {last}"] if last.exists() else [])) from None
    if training.rank == 0:
        console.print(f"best test accuracy {training.best:.2f} %, in {out}", soft_wrap=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
