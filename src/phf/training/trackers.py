"""Texts for trackers: the samples of a model in training, as a table.

Numbers reach trackers with the lines of metrics; transformers passes no texts on, so they are given to each tracker in
its own way. A tracker that phf does not know gets none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from phf.core.text import visible
from phf.training.metrics import JudgingCallback

COLUMNS = ["text", "score"]


class TextsCallback(TrainerCallback):
    """Passes the texts of `judges` to the trackers among `others`, which is the trainer's own list of callbacks."""

    def __init__(self, judges: Sequence[JudgingCallback], others: Sequence[TrainerCallback]) -> None:
        self.judges = judges
        self.others = others

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for judge in self.judges:
            if state.is_world_process_zero and judge.texts:
                for tracker in self.others:
                    show_texts(tracker, judge.texts, state.global_step)
            judge.texts = {}


def show_texts(tracker: TrainerCallback, tables: Mapping[str, Sequence[tuple[str, float]]], step: int) -> None:
    """Give tables of (text, score), by name, to a tracker's callback."""
    if (writer := getattr(tracker, "tb_writer", None)) is not None:
        for name, rows in tables.items():
            writer.add_text(name, markdown(rows), step)
    if (wandb := getattr(tracker, "_wandb", None)) is not None:
        made = {name: wandb.Table(columns=COLUMNS, data=[list(row) for row in rows]) for name, rows in tables.items()}
        wandb.log(made | {"train/global_step": step})
    if (trackio := getattr(tracker, "_trackio", None)) is not None:
        import pandas as pd

        frames = {name: pd.DataFrame(rows, columns=COLUMNS) for name, rows in tables.items()}
        tables_of = {name: trackio.Table(dataframe=frame) for name, frame in frames.items()}
        trackio.log(tables_of | {"train/global_step": step})


def markdown(rows: Sequence[tuple[str, float]]) -> str:
    """A table in Markdown. What would be markup is shown as it is."""
    lines = ["| score | text |", "|---|---|"]
    for text, score in rows:
        shown = visible(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "⏎ ")
        lines.append(f"| {score:.4g} | {shown} |")
    return "\n".join(lines)
