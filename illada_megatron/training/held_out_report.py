"""Held-out figures for people and for files, and what an interrupted evaluation leaves behind."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist

from illada_megatron.system.whole_file import replaced
from illada_megatron.training.held_out_figures import T_BINS, Estimate, HeldOut, TextFigures, position_bins
from illada_megatron.training.validation import HeldOutSource, Losses

_MOST_TIME_FOR_NOTES = 0.02


def summary(figures: TextFigures) -> str:
    """The bound in one line."""
    bytes_ = "" if figures.bits_per_byte is None else f", {figures.bits_per_byte} bits/byte"
    return f"{figures.nats_per_token} nats/token{bytes_}"


def lines(held_out: HeldOut) -> Iterator[str]:
    """What `illada evaluate` says below its first line."""
    mean = held_out.mean
    if len(held_out.texts) > 1:
        width = max(len(text.name) for text in held_out.texts)
        yield "the mean of"
        yield from (f"  {text.name:<{width}}  {summary(text)}  {_read(text)}" for text in held_out.texts)
    else:
        yield _read(mean)
    if mean.nats_per_byte is not None:
        yield f"{mean.nats_per_byte} nats/byte over {mean.num_bytes:,} bytes of text"
    else:
        yield f"bytes are not known: {held_out.bytes_unknown}"
    shown = ("-" if one is None else f"{one.value:.3f}" for one in mean.by_t)
    yield "nats/token by t, from 0 in steps of 0.1: " + "  ".join(shown)
    yield "nats/token by position, first to last: " + "  ".join(f"{one.value:.3f}" for one in mean.by_position)


def _read(text: TextFigures) -> str:
    return (
        f"{text.num_samples:,} samples of the {text.num_windows:,} windows, {text.num_tokens:,} tokens"
        if text.num_samples
        else ""
    )


def as_record(held_out: HeldOut, window_tokens: int) -> dict[str, Any]:
    """All figures, for JSON: of each text by its name, and their mean."""
    return {
        "mean": _record(held_out.mean, window_tokens),
        "texts": {text.name: _record(text, window_tokens) for text in held_out.texts},
        "bytes_unknown": held_out.bytes_unknown,
    }


def scalars(held_out: HeldOut, window_tokens: int) -> Iterator[tuple[str, float]]:
    """What TensorBoard is told, by tag."""
    places = {"validation": held_out.mean}
    if len(held_out.texts) > 1:
        places |= {f"validation/{text.name}": text for text in held_out.texts}
    for place, text in places.items():
        for unit in ("nats_per_token", "nats_per_byte", "bits_per_byte"):
            yield from _with_error(f"{place}/bound_{unit}", getattr(text, unit))
    mean = held_out.mean
    for number, one in enumerate(mean.by_t):
        if one is not None:
            yield f"validation_by_t_nats_per_token/{number / T_BINS:.1f}-{(number + 1) / T_BINS:.1f}", one.value
    for (first, last), one in zip(_positions(window_tokens), mean.by_position, strict=True):
        yield f"validation_by_position_nats_per_token/{first}-{last}", one.value


def _with_error(tag: str, estimate: Estimate | None) -> Iterator[tuple[str, float]]:
    if estimate is not None:
        yield tag, estimate.value
        if estimate.standard_error is not None:
            yield f"{tag}_standard_error", estimate.standard_error


def _record(text: TextFigures, window_tokens: int) -> dict[str, Any]:
    return {
        **{name: getattr(text, name) for name in ("num_samples", "num_windows", "num_tokens", "num_bytes")},
        **{
            name: None if (one := getattr(text, name)) is None else asdict(one)
            for name in ("nats_per_token", "nats_per_byte", "bits_per_byte")
        },
        "by_t_nats_per_token": [
            None if one is None else {"from": number / T_BINS, "to": (number + 1) / T_BINS, **asdict(one)}
            for number, one in enumerate(text.by_t)
        ],
        "by_position_nats_per_token": [
            {"from": first, "to": last, **asdict(one)}
            for (first, last), one in zip(_positions(window_tokens), text.by_position, strict=True)
        ],
    }


def _positions(window_tokens: int) -> list[tuple[int, int]]:
    """First and last position of each part of the window."""
    firsts = np.flatnonzero(np.diff(position_bins(window_tokens), prepend=-1)).tolist()
    return [(first, end - 1) for first, end in zip(firsts, [*firsts[1:], window_tokens], strict=True)]


def write_report(path: Path, of: dict[str, Any], held_out: HeldOut, source: HeldOutSource, losses: Losses) -> None:
    """The file of `illada evaluate --json`: what was evaluated, all figures, and each sample's loss, by which two
    checkpoints are compared sample by sample. Raises OSError."""
    samples = source.samples
    each = {}
    for number, text in enumerate(held_out.texts):
        mine = range(number * samples.num_samples, (number + 1) * samples.num_samples)
        each[text.name] = {
            "window": [samples.window(index)[1] for index in mine],
            "t": [samples.t(index) for index in mine],
            "nats_per_token": (losses.nats[mine.start : mine.stop].sum(1) / samples.sequence_length).tolist(),
        }
    record = {"of": of, **as_record(held_out, samples.sequence_length), "samples": each}
    with replaced(path) as file:
        file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")


class Notes:
    """What an evaluation has so far, in FILE.partial beside the file it is to write; the next one of the same weights
    and samples goes on from there, with any number of ranks."""

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path = path.with_name(path.name + ".partial")
        self._of = of
        self._next = 0.0

    def read(self, losses: Losses) -> list[str]:
        """Fill `losses`; returns what is to be said of it. Raises OSError."""
        if not self.path.exists():
            return []
        try:
            found = orjson.loads(self.path.read_bytes())
            if found["of"] != self._of:
                return [f"{self.path}: is of another evaluation, and is written anew"]
            done, nats, num_bytes = found["done"], found["nats"], found["num_bytes"]
            losses.nats[:done] = np.array(nats, dtype=np.float64).reshape(done, losses.nats.shape[1])
            losses.num_bytes[:done] = np.array(num_bytes, dtype=np.float64)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            losses.nats[:], losses.num_bytes[:] = 0.0, 0.0
            return [f"{self.path}: is damaged ({error}), and is written anew"]
        losses.done = done
        return [f"goes on from {self.path}, after sample {done} of {len(losses.nats)}"]

    def write(self, losses: Losses) -> None:
        """Replace what is there, as often as it takes no more than a fiftieth of the time. Raises OSError."""
        begin = time.monotonic()
        if begin < self._next and losses.done < len(losses.nats):
            return
        done = losses.done
        num_bytes = [None if math.isnan(one) else one for one in losses.num_bytes[:done].tolist()]
        record = {"of": self._of, "done": done, "nats": losses.nats[:done].tolist(), "num_bytes": num_bytes}
        with replaced(self.path) as file:
            file.write(orjson.dumps(record))
        end = time.monotonic()
        self._next = end + (end - begin) / _MOST_TIME_FOR_NOTES

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def agree(losses: Losses, device: torch.device) -> None:
    """Every rank gets what rank 0 has read. Others' are empty."""
    for array in (losses.nats, losses.num_bytes):
        shared = torch.from_numpy(array).to(device)
        dist.all_reduce(shared)
        array[:] = shared.cpu().numpy()
    done = torch.tensor([losses.done], device=device)
    dist.all_reduce(done)
    losses.done = int(done.item())
