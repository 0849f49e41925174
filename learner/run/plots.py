"""The run's pictures, drawn from `metrics.jsonl` and the evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import metrics as names
from learner.evaluation.evaluate import MODES, Evaluation
from learner.run.run_directory import replacing

Lines = Sequence[dict[str, Any]]
_SIZE_INCHES = (8.0, 4.5)


def draw_plots(directory: Path, metrics: Lines, evaluations: Sequence[Evaluation]) -> list[Path]:
    """Write `reward.png`, `accuracy.png`, `erase_rate.png` and `threshold.png`; returns their paths."""
    return [
        _reward(directory / "reward.png", metrics),
        _accuracy(directory / "accuracy.png", evaluations),
        _erase_rate(directory / "erase_rate.png", metrics),
        _threshold(directory / "threshold.png", metrics),
    ]


def _reward(path: Path, metrics: Lines) -> Path:
    axes = _axes()
    _line(axes, metrics, names.REWARD_MEAN, "all responses", linewidth=2.0)
    _line(axes, metrics, names.REWARD_PLAIN, "plain responses", linestyle="--")
    _line(axes, metrics, names.REWARD_TREATED, "treated responses", linestyle=":")
    _line(axes, metrics, names.SIGNAL_SHARE, "groups with mixed rewards", color="0.7")
    return _finish(path, axes, "Reward of the training responses", "mean reward, share of groups")


def _accuracy(path: Path, evaluations: Sequence[Evaluation]) -> Path:
    axes = _axes()
    for mode, colour in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
        points = [e for e in evaluations if e.mode == mode]
        steps = [e.step for e in points]
        axes.plot(steps, [e.avg_at_k for e in points], "o-", color=colour, label=f"{mode}, Avg@k")
        axes.plot(steps, [e.pass_at_k for e in points], "s--", color=colour, label=f"{mode}, Pass@k")
    axes.set_ylim(-0.02, 1.02)
    k = evaluations[-1].k if evaluations else 0
    return _finish(path, axes, f"Accuracy on held-out problems (k = {k})", "share of right answers")


def _erase_rate(path: Path, metrics: Lines) -> Path:
    axes = _axes()
    _line(axes, metrics, names.ERASE_RATE, "erased attempts / attempts of erasable responses")
    _line(axes, metrics, names.RECOVERED_RATE, "recovered slips / slips", linestyle="--")
    _line(axes, metrics, names.CASCADE_RATE, "responses lost to a cascade", linestyle=":")
    _line(axes, metrics, names.TREATED_SHARE, "treated share of each group", color="0.7")
    return _finish(path, axes, "Erasure in the training responses", "share")


def _threshold(path: Path, metrics: Lines) -> Path:
    axes = _axes()
    _line(axes, metrics, names.UNCERTAINTY_MEAN, "uncertainty U of the segments")
    _line(axes, metrics, names.THRESHOLD_MEAN, "threshold $\\Theta$", linestyle="--")
    return _finish(path, axes, "Uncertainty and threshold, mean over attempts", "nats")


def _axes() -> Axes:
    figure = Figure(figsize=_SIZE_INCHES)
    return figure.add_subplot()


def _line(axes: Axes, metrics: Lines, name: str, label: str, **style: Any) -> None:
    points = [(line[names.STEP], line[name]) for line in metrics if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _finish(path: Path, axes: Axes, title: str, unit: str) -> Path:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center")
    with replacing(path) as partial:
        cast(Figure, axes.figure).savefig(partial, format="png", dpi=120, bbox_inches="tight")
    return path
