"""Figures of the held-out bound, and how far off they may be, from the losses of single samples. No model here."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

T_BINS = 10
POSITION_BINS = 8
_TREND_DEGREE = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over samples."""

    value: float
    standard_error: float | None
    """None: too few samples to say."""

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" +- {self.standard_error:.4f}" if self.standard_error is not None else "")

    def times(self, factor: float) -> "Estimate":
        """In another unit."""
        return Estimate(self.value * factor, None if self.standard_error is None else self.standard_error * factor)


@dataclass(frozen=True)
class TextFigures:
    """The bound of one held-out text, or the mean of several's."""

    name: str
    """Of the path or of the blend's corpus; "" where there is one; "mean"."""
    num_samples: int
    num_tokens: int
    """Evaluated."""
    num_windows: int
    """That the text has; not all of them need be among the samples."""
    num_bytes: int | None
    """Of UTF-8 text behind the evaluated tokens; None: it is not known."""
    nats_per_token: Estimate
    nats_per_byte: Estimate | None
    by_t: list[Estimate | None]
    """nats/token of the samples with t in [k/10, (k+1)/10): mean CE of a masked token; None where there are none."""
    by_position: list[Estimate]
    """nats/token of each eighth of the window (each position, where it has fewer)."""

    @property
    def bits_per_byte(self) -> Estimate | None:
        return None if self.nats_per_byte is None else self.nats_per_byte.times(1 / math.log(2))


@dataclass(frozen=True)
class HeldOut:
    """Held-out figures of a model."""

    texts: list[TextFigures]
    bytes_unknown: str | None
    """Why there are no figures per byte."""

    @property
    def mean(self) -> TextFigures:
        """The plain mean of the texts' figures; the text's own, where there is one."""
        if len(self.texts) == 1:
            return self.texts[0]
        columns = zip(*(text.by_t for text in self.texts), strict=True)
        by_t = [_mean([one for one in column if one is not None]) for column in columns]
        per_byte = [text.nats_per_byte for text in self.texts if text.nats_per_byte is not None]
        known = [text.num_bytes for text in self.texts if text.num_bytes is not None]
        per_token = _mean([text.nats_per_token for text in self.texts])
        assert per_token is not None
        return TextFigures(
            name="mean",
            num_samples=sum(text.num_samples for text in self.texts),
            num_tokens=sum(text.num_tokens for text in self.texts),
            num_windows=sum(text.num_windows for text in self.texts),
            num_bytes=sum(known) if len(known) == len(self.texts) else None,
            nats_per_token=per_token,
            nats_per_byte=_mean(per_byte) if len(per_byte) == len(self.texts) else None,
            by_t=by_t,
            by_position=[
                one for column in zip(*(text.by_position for text in self.texts), strict=True) if (one := _mean(column))
            ],
        )

    def noted(self, step: int) -> dict[str, float] | None:
        """For a checkpoint, whose exports say it; None where it is no number."""
        bound = self.mean.nats_per_token.value
        found = {"step": step, "bound_nats_per_token": bound, "tokens": self.mean.num_tokens}
        return found if math.isfinite(bound) else None


def text_figures(
    name: str,
    num_windows: int,
    window_tokens: int,
    t: NDArray[np.float64],
    nats: NDArray[np.float64],
    num_bytes: NDArray[np.float64] | None,
    windows: NDArray[np.int64] | None = None,
) -> TextFigures:
    """The figures of one text.

    t: of its samples, in their order, which is that of their windows `[n]`; nats: weighted CE summed over the positions
    of each part of the window `[n, position bins]`; num_bytes: of text behind each sample's tokens `[n]`; windows: the
    number of each sample's window, ascending `[n]`; None: they all differ.
    """
    losses = nats.sum(1) / window_tokens
    bins = np.minimum((t * T_BINS).astype(int), T_BINS - 1)
    per_part = np.bincount(position_bins(window_tokens))
    known = num_bytes is not None and bool(num_bytes.sum() > 0)
    return TextFigures(
        name=name,
        num_samples=len(t),
        num_tokens=len(t) * window_tokens,
        num_windows=num_windows,
        num_bytes=int(num_bytes.sum()) if num_bytes is not None and known else None,
        nats_per_token=Estimate(float(losses.mean()), standard_error(losses, t, windows)),
        nats_per_byte=_ratio(nats.sum(1), num_bytes, t, windows) if num_bytes is not None and known else None,
        by_t=[_plain(losses[bins == one]) for one in range(T_BINS)],
        by_position=[Estimate(float(part.mean()), standard_error(part, t, windows)) for part in (nats / per_part).T],
    )


def position_bins(window_tokens: int) -> NDArray[np.int64]:
    """The part of the window that each position is in `[window_tokens]`: eight equal ones, or one a position."""
    return np.arange(window_tokens) * min(POSITION_BINS, window_tokens) // window_tokens


def standard_error(
    values: NDArray[np.float64], t: NDArray[np.float64], windows: NDArray[np.int64] | None = None
) -> float | None:
    """Of the mean of `values` `[n]`, whose windows are spread evenly and in order, and whose times `t` `[n]` are
    stratified; None for fewer than two windows. windows: as of `text_figures`; samples of one window count as one,
    their mean, for they differ by masks alone.

    What t does to them on average is taken out first (a cubic, or less for few samples), because every stratum has its
    sample and so the mean does not feel it; and what differs slowly along the text counts little, because every stretch
    of it has its samples: the variance is half the mean square of the differences of neighbours (Wolter, "Introduction
    to Variance Estimation", 2007, section 8.2, estimator v2). It is that of text of this kind: where the samples are
    most of the windows that were held out, the figure's spread over seeds is smaller.
    """
    n = len(values)
    if n < 2:
        return None
    degree = min(_TREND_DEGREE, n // 4)
    residuals = values - np.polynomial.Polynomial.fit(t, values, degree, domain=[0, 1])(t)
    if windows is not None:
        first = np.flatnonzero(np.diff(windows, prepend=-1))
        residuals = np.add.reduceat(residuals, first) / np.diff(first, append=n)
    if (distinct := len(residuals)) < 2:
        return None
    variance = np.square(np.diff(residuals)).mean() / 2
    return math.sqrt(float(variance) / max(1, distinct - min(degree, distinct // 4)))


def _ratio(
    nats: NDArray[np.float64], num_bytes: NDArray[np.float64], t: NDArray[np.float64], windows: NDArray[np.int64] | None
) -> Estimate:
    """sum(nats) / sum(bytes): a ratio of two means, whose error is that of nats - ratio * bytes."""
    ratio = float(nats.sum() / num_bytes.sum())
    error = standard_error(nats - ratio * num_bytes, t, windows)
    return Estimate(ratio, None if error is None else error / float(num_bytes.mean()))


def _plain(values: NDArray[np.float64]) -> Estimate | None:
    if not len(values):
        return None
    return Estimate(
        float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    )


def _mean(estimates: "list[Estimate] | tuple[Estimate, ...]") -> Estimate | None:
    """Of independent estimates."""
    if not estimates:
        return None
    errors = [one.standard_error for one in estimates]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(estimates) if len(known) == len(errors) else None
    return Estimate(sum(one.value for one in estimates) / len(estimates), error)
