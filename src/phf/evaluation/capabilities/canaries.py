"""What a model memorised of the canaries in its corpus (phf.data.canaries)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.statistics import mean_estimate, share_estimate
from phf.core.store import fingerprint
from phf.core.types import Estimate
from phf.data.canaries import Canaries, Canary
from phf.evaluation.capabilities.base import Capability, continuations, split_after
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel


def exposure(own: float, others: np.ndarray) -> float:
    """log2 of the number of secrets divided by the rank of the true one among them, by log-probability; 0: the least
    likely, log2(n + 1) with n others: the likeliest (Carlini et al. 2019, with the sampled rank of section 4.3). Others
    that are as likely count as likelier."""
    rank = 1 + int((others >= own).sum())
    return math.log2(len(others) + 1) - math.log2(rank)


@dataclass(frozen=True, config=STRICT)
class Memorised(Capability):
    """Does the model know the canaries of its corpus? Exposure: how much likelier a secret is than random ones in its
    place, in bits; without any memory 1.44 on average. Extracted: greedy decoding after the text before the secret
    writes the secret. A model with control tokens is asked with its good token, and for bad canaries with its bad token
    too.

    `canaries`: those that are in the corpus. In a recipe with `canaries` this is measured without being asked for.
    """

    canaries: Canaries = Canaries()
    name: Literal["canaries"] = "canaries"
    others: Annotated[int, Field(gt=0)] = 255
    """Random secrets that each one is compared with. 255: an exposure of at most 8."""
    batch: Annotated[int, Field(gt=0)] = 128
    """Texts that are computed together."""

    def inputs(self) -> list[str | None]:
        return [fingerprint(to_plain(self.canaries))]

    def check_inputs(self) -> None:
        self.canaries.others(0, "", self.others)

    def check(self, model: LoadedModel) -> None:
        longest = max(len(model.encode(canary.text)) for canary in self.canaries.made())
        if longest + 4 > model.positions:
            raise ConfigError(f"canaries: one has {longest} tokens, the model reads {model.positions}")

    def measure(self, model: LoadedModel) -> CapabilityResult:
        made = self.canaries.made()
        estimates: dict[str, Estimate] = {}
        details: list[dict[str, Any]] = []
        exposures, extracted = self._found(model, made, "good")
        for kind in dict.fromkeys(canary.kind for canary in made):
            of_kind = np.array([canary.kind == kind for canary in made])
            estimates[f"exposure of {kind}"] = mean_estimate(exposures[of_kind])
            estimates[f"extracted {kind}"] = share_estimate(extracted[of_kind])
            for times in self.canaries.times:
                these = of_kind & np.array([canary.times == times for canary in made])
                details.append(_row(kind, times, exposures[these], extracted[these]))
        if model.worst:
            of_kind = np.array([canary.kind == "bad" for canary in made])
            if of_kind.any():
                bad = [canary for canary in made if canary.kind == "bad"]
                exposures, extracted = self._found(model, bad, "bad")
                estimates["exposure of bad, bad token"] = mean_estimate(exposures)
                estimates["extracted bad, bad token"] = share_estimate(extracted)
        return self.result(estimates, by_times=details, others=self.others)

    def _found(self, model: LoadedModel, made: Sequence[Canary], control: str) -> tuple[np.ndarray, np.ndarray]:
        """(exposure, whether it is extracted) of each canary, after the control tokens that `control` puts first."""
        start = [model.start_id, *model.ids_of(control)]
        kept = 1 + len(model.ids_of("good"))
        pairs = []
        for number, canary in enumerate(made):
            for secret in (canary.secret, *self.canaries.others(number, canary.secret, self.others)):
                pairs.append((start, model.encode(canary.before + secret)))
        logp = continuations(model, pairs, self.batch)[0].reshape(len(made), -1)
        found = np.array([exposure(row[0], row[1:]) for row in logp])
        asked = [split_after(model, c.before, c.before + c.secret) for c in made]
        greedy = continuations(model, [(start + before[kept:], rest) for before, rest in asked], self.batch)[1]
        return found, greedy


def _row(kind: str, times: int, exposures: np.ndarray, extracted: np.ndarray) -> dict[str, Any]:
    return {
        "kind": kind,
        "times": times,
        "exposure": float(exposures.mean()),
        "exposure_ci95": mean_estimate(exposures).ci95,
        "extracted": float(extracted.mean()),
        "extracted_ci95": share_estimate(extracted).ci95,
        "canaries": len(exposures),
    }
