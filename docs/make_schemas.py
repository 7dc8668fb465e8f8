"""Write the JSON schemas of phf's files and of recipes into docs/schemas: python docs/make_schemas.py"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from phf.core.docs import field_docs
from phf.core.runs import TrainManifest
from phf.data.scored import ScoreManifest
from phf.evaluation.results import EvalResult, MonitorLine
from phf.labelling.label import LabelManifest
from phf.recipes.recipe import Recipe
from phf.redteaming.persist import PersistResult
from phf.redteaming.results import RedTeamResult
from phf.redteaming.tamper import TamperResult
from phf.release import ExportManifest
from phf.report.results import RecipeResults
from phf.scorers.fitted import ScorerRecord
from phf.scoring.audit import Audit
from phf.scoring.inspection import Inspection
from phf.tokens.store import TokensManifest
from phf.training.metrics import MetricsLine

FILES: dict[str, tuple[type, str]] = {
    "manifest-score": (ScoreManifest, "manifest.json of a scored corpus"),
    "manifest-label": (LabelManifest, "manifest.json of labels"),
    "scorer": (ScorerRecord, "scorer.json of a fitted scorer"),
    "manifest-tokenize": (TokensManifest, "manifest.json of a token store"),
    "manifest-train": (TrainManifest, "manifest.json of a run"),
    "manifest-export": (ExportManifest, "manifest.json of a release"),
    "inspect": (Inspection, "inspect.json"),
    "audit": (Audit, "audit.json"),
    "metrics": (MetricsLine, "A line of metrics.jsonl"),
    "monitor": (MonitorLine, "A line of monitor.jsonl"),
    "eval": (EvalResult, "eval.json"),
    "redteam": (RedTeamResult, "redteam.json"),
    "tamper": (TamperResult, "tamper.json"),
    "persist": (PersistResult, "persist.json"),
    "results": (RecipeResults, "results.json of a recipe"),
    "recipe": (Recipe, "A recipe"),
}


def dataclasses_in(type_: Any, found: dict[str, type]) -> dict[str, type]:
    """All dataclasses that a type holds, by name."""
    if dataclasses.is_dataclass(type_) and isinstance(type_, type) and type_.__name__ not in found:
        found[type_.__name__] = type_
        for hint in typing.get_type_hints(type_, include_extras=True).values():
            dataclasses_in(hint, found)
    for inner in typing.get_args(type_):
        dataclasses_in(inner, found)
    return found


def describe(schema: dict[str, Any], thing: type) -> None:
    """Put the docstrings of a dataclass and of its fields into its schema."""
    schema["description"] = " ".join((inspect.getdoc(thing) or "").split())
    for name, text in field_docs(thing).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = text


def schema_of(type_: type, title: str) -> dict[str, Any]:
    schema = TypeAdapter(type_).json_schema()
    for name, thing in dataclasses_in(type_, {}).items():
        describe(schema if thing is type_ else schema.get("$defs", {}).get(name, {}), thing)
    if type_ is MetricsLine:  # the objective's own metrics are next to the others
        del schema["properties"]["objective"]
        schema["additionalProperties"] = {"type": ["number", "null"]}
    if type_ is Recipe:  # a file may hold only what differs from its base
        del schema["required"]
        schema["properties"]["base"] = {
            "type": "string",
            "description": "A packaged recipe or a file that this file is merged into.",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def schemas() -> dict[str, str]:
    """The text of each schema, by file name."""
    return {
        f"{name}.json": json.dumps(schema_of(type_, title), indent=1, ensure_ascii=False) + "\n"
        for name, (type_, title) in FILES.items()
    }


if __name__ == "__main__":
    folder = Path(__file__).with_name("schemas")
    folder.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
