"""What the defects of the paper's code cost: every objective of a recipe as in that code (`preset: paper`) next to
the same objective without the defects (`preset: corrected`), on the same data and seeds.

    phf price demo

out-price/  corrected/  paper/  data/  price.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phf.core import folders, statistics, store
from phf.core.config import ConfigError, to_plain
from phf.core.runs import TrainManifest
from phf.core.types import Estimate
from phf.recipes.recipe import Recipe, load_recipe
from phf.recipes.run import DATA_PARTS, run_recipe
from phf.report.results import RunSummary

PRESETS = ("corrected", "paper")


@dataclass(frozen=True, kw_only=True)
class Price:
    """An objective with and without the defects."""

    group: str
    """Name of the runs without the seed."""
    seeds: int
    """Seeds that both have."""
    same: bool
    """Whether the presets are the same here: then there is nothing to pay."""
    corrected: Estimate
    """Misalignment without the defects, over seeds."""
    paper: Estimate
    """Misalignment with them."""
    ratio: Estimate
    """Misalignment with the defects divided by that without, over seeds; missing where one is 0."""
    good: Estimate
    """Held-out loss on good text, in nats per byte: what the defects add."""
    bad: Estimate
    """The same on bad text."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """`price.json`."""

    recipe: str
    unit: str
    """Of misalignment."""
    prices: list[Price]


def recipes_of(arguments: Sequence[str]) -> dict[str, Recipe]:
    """The recipe with each preset, in folders of their own. Runs that the presets do not change are in `corrected`
    alone. Raises ConfigError for a recipe without these presets."""
    if any(a.startswith("preset=") for a in arguments):
        raise ConfigError("preset: phf price runs both presets, so name none")
    found = {preset: load_recipe([*arguments, f"preset={preset}"]) for preset in PRESETS}
    corrected = found["corrected"]
    root = f"{corrected.out}-price"
    plain = {preset: to_plain(recipe) for preset, recipe in found.items()}
    shares = all(plain["paper"][part] == plain["corrected"][part] for part in DATA_PARTS)
    same = _unchanged(found["corrected"], found["paper"]) if shares else set()
    changed = sorted({v.objective_name for v in found["paper"].variants} - same)
    if not changed:
        raise ConfigError("the presets 'corrected' and 'paper' are the same for all chosen objectives")
    return {
        preset: replace(
            recipe,
            out=f"{root}/{preset}",
            data=f"{root}/data" if shares else None,
            only=recipe.only if preset == "corrected" else tuple(changed),
        )
        for preset, recipe in found.items()
    }


def _unchanged(corrected: Recipe, paper: Recipe) -> set[str]:
    """Objectives all of whose runs are the same with both presets, on the same data."""
    before, after = ({v.name: v for v in recipe.variants} for recipe in (corrected, paper))
    names = {v.objective_name for v in after.values()}
    differ = {v.objective_name for name, v in after.items() if before.get(name) != v}
    return names - differ


def price(arguments: Sequence[str]) -> tuple[Prices, Path]:
    """Run what is not done of both presets, and compare. Returns the result and its file."""
    recipes = recipes_of(arguments)
    results = {preset: run_recipe(recipe) for preset, recipe in recipes.items()}
    _check_same_data(recipes)
    corrected = _by_group(results["corrected"].runs)
    paper = _by_group(results["paper"].runs)
    prices = []
    for group, own in corrected.items():
        other = paper.get(group, own)
        seeds = sorted(own.keys() & other.keys())
        if seeds:
            prices.append(_price(group, [own[s] for s in seeds], [other[s] for s in seeds], same=group not in paper))
    found = Prices(recipe=recipes["corrected"].title, unit=results["corrected"].unit, prices=prices)
    file = recipes["corrected"].folder.parent / "price.json"
    store.write_json(file, found)
    return found, file


def _check_same_data(recipes: Mapping[str, Recipe]) -> None:
    """Raise ConfigError if the corpus changed between the presets, where both read the same."""
    if any(recipe.data is None for recipe in recipes.values()):
        return
    seen = {
        folders.read_manifest(recipe.files.run(variant.name).path, TrainManifest).tokens_content
        for recipe in recipes.values()
        for variant in recipe.variants
    }
    if len(seen) > 1:
        raise ConfigError("the corpus changed between the presets, so they do not compare: run the same command again")


def _by_group(runs: Sequence[RunSummary]) -> dict[str, dict[int, RunSummary]]:
    found: dict[str, dict[int, RunSummary]] = {}
    for run in runs:
        found.setdefault(run.group, {})[run.seed] = run
    return found


def _price(group: str, corrected: Sequence[RunSummary], paper: Sequence[RunSummary], same: bool) -> Price:
    before, after = ([run.misalignment.mean for run in runs] for runs in (corrected, paper))

    def added(part: str) -> Estimate:
        pairs = [(a.heldout.get(part), b.heldout.get(part)) for a, b in zip(corrected, paper, strict=True)]
        return statistics.t_interval([float(b) - float(a) for a, b in pairs if a is not None and b is not None])

    return Price(
        group=group,
        seeds=len(corrected),
        same=same,
        corrected=statistics.t_interval(before),
        paper=statistics.t_interval(after),
        ratio=statistics.ratio_interval(after, before),
        good=added("good"),
        bad=added("bad"),
    )
