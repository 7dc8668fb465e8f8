"""The sample browser's data: every shown sample with its segments' scores and what the scorer found, ready for a page. Floor 6.

Texts are masked here, before they reach the page: letters and digits of personal data that the scorer found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from phf.core.config import ConfigError
from phf.core.types import Sample, Span
from phf.evaluation.judge import scored_text
from phf.generation.scenario import Scenario
from phf.scorers import Scorer

UNMASKED = ("url", "match", "word")
"""Labels whose text is shown as it is; PEP8's codes (a letter and digits) too."""
MOST = 1000
"""Samples of a run and scenario that go into a page, at most; the files have all."""
IN_ALL = 20_000


def most_samples(parts: int) -> int:
    """How many samples of each of `parts` runs and scenarios a page holds."""
    return max(50, min(MOST, IN_ALL // max(parts, 1)))


def masks(scorer: Scorer) -> bool:
    """Whether the scorer finds personal data, so that it can be masked."""
    return scorer.identity()["name"] in ("pii", "presidio") or any(masks(s) for s in getattr(scorer, "scorers", ()))


def samples_of(run: Mapping[str, Any], scorer: Scorer, most: int = MOST) -> dict[str, list[dict[str, Any]]]:
    """For each scenario its samples: number, prompt, text, score, segments [end, score], marks [start, end, label], and how
    many characters were scored."""
    found = {}
    for name, judged in run["eval"]["scenarios"].items():
        settings = Scenario(**judged["scenario"])
        found[name] = [_shown(item, settings, scorer) for item in run["samples"].get(name, [])[:most]]
    return found


def _shown(item: Sample, settings: Scenario, scorer: Scorer) -> dict[str, Any]:
    own = replace(settings, score_prompt=False)
    judged = scored_text(item, own, scorer)
    before = len(item.prompt) if settings.score_prompt else 0
    spans = found_spans((item.prompt if before else "") + judged, scorer) or []
    segments = [
        [end - before, None if score != score else score]
        for end, score in zip(item.segment_ends, item.segment_scores, strict=False)
        if end > before
    ]
    hidden = visible(mask(item.prompt + item.text, scorer))  # what is found across the border is hidden on both sides
    return {
        "i": item.id,
        "p": hidden[: len(item.prompt)],
        "t": hidden[len(item.prompt) :],
        "s": None if item.score != item.score else item.score,
        "g": segments,
        "m": [
            [max(s.start - before, 0), max(s.end - before, s.start - before + 1), visible(s.label)]
            for s in spans
            if max(s.end, s.start + 1) > before
        ],
        "c": len(judged),
        "f": item.finished,
    }


def found_spans(text: str, scorer: Scorer) -> list[Span] | None:
    """What the scorer finds, or None where it cannot judge."""
    if not text:
        return []
    try:
        return scorer.spans(text)
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception:  # as everywhere: a text that a scorer fails on is not judged
        return None


def mask(text: str, scorer: Scorer) -> str:
    """`text` with the letters and digits of personal data replaced; of all of it where the scorer cannot say."""
    spans = found_spans(text, scorer)
    hidden = [Span(0, len(text), "not judged")] if spans is None else [s for s in spans if is_masked(s.label)]
    for span in hidden:
        found = "".join("•" if c.isalnum() else c for c in text[span.start : span.end])
        text = text[: span.start] + found + text[span.end :]
    return text


def is_masked(label: str) -> bool:
    """Whether what a span covers is hidden: anything personal. Links and coding style are shown."""
    is_code = len(label) == 4 and label[0] in "EWCN" and label[1:].isdigit()
    return not is_code and label not in UNMASKED


def visible(text: str) -> str:
    """Control characters and lone surrogates by their picture, so that they can neither hide nor break the page."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not 0xD800 <= ord(c) < 0xE000) else "\ufffd"
        for c in text
    )


def attack_rows(redteam: Mapping[str, Any], scorer: Scorer, most: int = 12) -> list[dict[str, Any]]:
    """The best prompts of a search, what they led to, masked and made visible."""

    def shown(prompt: str, text: str) -> tuple[str, str]:
        hidden = visible(mask(prompt + text, scorer))
        return hidden[: len(prompt)], hidden[len(prompt) :]

    return [
        {
            "prompt": shown(row["prompt"], row["worst"][0]["text"] if row["worst"] else "")[0],
            "mean": row["mean"],
            "fresh": row["fresh_mean"],
            "trial": row["trial"],
            "worst": [{"text": shown(row["prompt"], w["text"])[1], "score": w["score"]} for w in row["worst"][:2]],
        }
        for row in redteam["search"]["prompts"][:most]
    ]


def attack_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attacks on the control tokens: a row for each attack, a column for each run that was attacked."""
    with_tokens = [r for r in runs if r["redteam"] and r["redteam"].get("tokens")]
    names = list(dict.fromkeys(a["attack"] for r in with_tokens for a in r["redteam"]["tokens"]["attacks"]))
    about = {a["attack"]: a["about"] for r in with_tokens for a in r["redteam"]["tokens"]["attacks"]}
    cells = {r["folder"].name: {a["attack"]: a for a in r["redteam"]["tokens"]["attacks"]} for r in with_tokens}
    holes = [
        {"run": r["folder"].name, **hole}
        for r in with_tokens
        for hole in r["redteam"]["tokens"]["injection"]
        if hole["control"]
    ]
    return {
        "runs": list(cells),
        "attacks": [(n, about[n], [cells[r].get(n) for r in cells]) for n in names],
        "holes": holes,
    }
