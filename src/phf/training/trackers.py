"""What trackers get in addition to numbers: the objective and the scorer of the run, and samples as a table.

Numbers reach trackers with the lines of metrics; transformers passes nothing else on, so it is given to each tracker in
its own way. A tracker that phf does not know gets numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from phf.core.config import Plain, dump_yaml
from phf.core.text import visible
from phf.training.metrics import JudgingCallback

COLUMNS = ["text", "score"]


class TrackersCallback(TrainerCallback):
    """Says what a run is, and passes the texts of `judges`, to the trackers among `others`, which is the trainer's own
    list of callbacks. `about`: the settings that name the run, by what they are of."""

    def __init__(
        self, about: Mapping[str, Plain], judges: Sequence[JudgingCallback], others: Sequence[TrainerCallback]
    ) -> None:
        self.about = about
        self.judges = judges
        self.others = others

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for tracker in self.others:
                show_run(tracker, self.about)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for judge in self.judges:
            if state.is_world_process_zero and judge.texts:
                for tracker in self.others:
                    show_texts(tracker, judge.texts, state.global_step)
            judge.texts = {}


def show_run(tracker: TrainerCallback, about: Mapping[str, Plain]) -> None:
    """Give a tracker's callback the settings of a run as its configuration, and their names as tags."""
    tags = [f"{what}: {settings['name']}" for what, settings in about.items() if "name" in settings]
    if (writer := getattr(tracker, "tb_writer", None)) is not None:
        writer.add_text("phf", "\n".join(f"    {line}" for line in dump_yaml(dict(about)).splitlines()), 0)
    for name in ("_wandb", "_trackio"):
        if (module := getattr(tracker, name, None)) is not None:
            module.config.update({"phf": dict(about)}, allow_val_change=True)
    if (run := getattr(getattr(tracker, "_wandb", None), "run", None)) is not None:
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))
    if (mlflow := getattr(tracker, "_ml_flow", None)) is not None:
        mlflow.set_tags({f"phf.{what}": str(settings.get("name", "")) for what, settings in about.items()})


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
