"""The report of a run: pictures as PNG files and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.errors import ConfigError

from . import figures
from .recorder import TIMELINE_FILE, Row, read_rows
from .screen import summary_lines
from .timeline import draw_timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { max-width: 46rem; margin: .3rem 0 .6rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
td { padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #e4e4e4; }
td:last-child { font-variant-numeric: tabular-nums; font-weight: 600; }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
"""

INTRODUCTION = (
    "A small Qwen3-shaped model, dense or a mixture of experts, learns to sort digits with {algorithm}. The trainer "
    "runs in one process and the rollout engine in another; after every step the trainer pushes its weights into the "
    "engine through shared memory."
)

CAPTIONS = {
    "learning": (
        "Does it learn?",
        "Sampled pass rate and mean reward. The engine of the control never gets new weights: its trainer learns, its "
        "rollouts stay as they were.",
    ),
    "logprob_gap": (
        "Does the engine sample from the trainer's policy?",
        "The trainer computes the log-probability of every sampled token again before it updates. Of completions that "
        "its own version sampled, the two may differ by rounding alone; in the synchronous mode those are all. Where "
        "weights change under running requests, most tokens were sampled by earlier versions, whose log-probabilities "
        "they keep: that difference is the policy's, not the engine's, and the importance weights correct for it.",
    ),
    "timeline": (
        "Weights change under running requests",
        "One row per request, a colour per weight version, white ticks where a token was sampled. At a commit a "
        "running request goes on with its next token under the new version.",
    ),
    "sync": (
        "What a weight sync costs",
        "Wall time of each update, and how long generation stood still for it.",
    ),
}


def check_can_draw() -> None:
    """Raise `ConfigError` when matplotlib is missing; called before a run rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the report cannot be drawn: matplotlib is not installed; pip install 'rollout-sync[demo]'"
        )


def write_report(
    folder: Path, summary: Mapping[str, Any], *, settings: Mapping[str, Any]
) -> list[Path]:
    """Draw what is recorded in `folder`; returns the PNG files, which lie beside `report.html`."""
    pictures = {}
    for name, figure in _draw(folder, summary["mode"]).items():
        pictures[name] = folder / f"{name}.png"
        figure.savefig(pictures[name])
    (folder / "report.html").write_text(
        _page(folder.name, summary, settings, pictures), encoding="utf-8"
    )
    return list(pictures.values())


def _draw(folder: Path, mode: str) -> dict[str, Figure]:
    rows: list[Row] = read_rows(folder)
    drawn = {"learning": figures.learning_curve(rows), "logprob_gap": figures.logprob_gap(rows)}
    timeline = folder / TIMELINE_FILE
    if timeline.exists():
        title = (
            "Requests of the last steps"
            if mode != "sync"
            else "Requests of the in-flight phase, after the synchronous run"
        )
        drawn["timeline"] = draw_timeline(json.loads(timeline.read_text()), title)
    drawn["sync"] = figures.sync_times(rows)
    return drawn


def _page(
    name: str, summary: Mapping[str, Any], settings: Mapping[str, Any], pictures: Mapping[str, Path]
) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>"
        for label, value in summary_lines(summary)
    )
    sections = "".join(
        f"<h2>{html.escape(CAPTIONS[key][0])}</h2><p>{html.escape(CAPTIONS[key][1])}</p>"
        f'<img alt="{html.escape(CAPTIONS[key][0])}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for key, path in pictures.items()
    )
    introduction = INTRODUCTION.format(algorithm=summary["algorithm"].upper())
    title = html.escape(f"rollout demo: {name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{introduction}</p><table>{lines}</table>{sections}"
        f"<h2>Settings</h2><details><summary>{html.escape(summary['mode'])}, seed {summary['seed']}</summary>"
        f"<pre>{html.escape(json.dumps(settings, indent=2, default=str))}</pre></details></body></html>\n"
    )
