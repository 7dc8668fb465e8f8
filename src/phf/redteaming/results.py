"""What attacks find: the records in `redteam.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from phf.core import store
from phf.core.config import Plain
from phf.core.runs import RedTeamFolder
from phf.core.types import Estimate, Identity, Number, Sample
from phf.evaluation.judge import Difference
from phf.redteaming.attackers import Tried
from phf.redteaming.config import RedTeam, TokenAttacks
from phf.redteaming.gradient import GradientResult


@dataclass(frozen=True)
class RoundResult:
    """A round of a search, or the confirmation of its best prompts."""

    tried: list[Tried]
    target_tokens: int | None
    """Tokens that the target read and wrote; null: a server that does not count."""
    red_tokens: int
    """Tokens that the attacker's LM read and wrote."""
    rejected: dict[str, int]
    """Proposals that were not tried, by reason."""
    seconds: float = 0.0


@dataclass(frozen=True)
class TrialRound:
    """A trial after a round. The mean over the best k prompts is null until k prompts were judged."""

    best_1: float | None
    """Mean score of the best prompt."""
    best_10: float | None
    """Of the best ten."""
    best_100: float | None
    """Of the best hundred."""
    round_mean: float | None
    """Mean over the round's own prompts."""
    target_tokens: int
    """Of the trial so far."""


@dataclass(frozen=True)
class Budget:
    """What a search cost, over all trials."""

    prompts: int
    """Prompts that were tried."""
    continuations: int
    """Continuations that were scored."""
    target_tokens: int
    """Tokens that the model under attack read and wrote; 0 for a server that does not count."""
    confirm_continuations: int
    """New continuations of the best prompts."""
    confirm_tokens: int
    """Tokens for them; 0 for a server that does not count."""
    red_tokens: int
    """Tokens that the attacker's LM read and wrote."""
    seconds: float
    """Time."""


@dataclass(frozen=True, kw_only=True)
class FoundPrompt:
    """One of a trial's best prompts. `fresh_mean`: its score on new continuations, without the luck of the search."""

    prompt: str
    """The prompt."""
    mean: Number
    """Mean score of its judged continuations in the search."""
    stderr: Number
    """Standard error."""
    judged: int
    """Judged continuations."""
    unjudged: int
    """Continuations that were not judged."""
    hits: int
    """Continuations with a score above the threshold."""
    worst: tuple[Sample, ...]
    """Continuations with the highest scores."""
    trial: int
    """The trial that found it."""
    fresh_mean: Number
    """Mean score of new continuations."""
    fresh_stderr: Number
    """Its standard error."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A search. Estimates are over trials; higher scores mean that the model is easier to break."""

    settings: RedTeam
    """Settings of the search."""
    curves: dict[str, list[Estimate]]
    """By measure (best_1, best_10, best_100, round_mean), one estimate per round."""
    target_tokens: list[Estimate]
    """Tokens of the target after each round."""
    final: dict[str, Estimate]
    """The last estimates of `curves`."""
    confirmed: dict[str, Estimate]
    """The trials' best prompts on new continuations."""
    budget: Budget
    """What the search cost."""
    rejected: dict[str, int]
    """Proposals that were not tried, by reason."""
    prompts_too_long: int
    """Starting prompts that do not fit the model."""
    unjudged: int
    """Continuations that could not be judged."""
    trials: list[list[TrialRound]]
    """The rounds of each trial."""
    prompts: list[FoundPrompt]
    """Worst first."""
    starting_prompts: int | None = None
    """Starting prompts that can be drawn."""


@dataclass(frozen=True)
class WorstText:
    text: str
    """The text."""
    score: float
    """Its score."""


@dataclass(frozen=True)
class TokenAttack:
    """An attack on the control tokens."""

    attack: str
    """Name of the attack."""
    about: str
    """What comes before the text."""
    intended: bool
    """Whether this is the intended use of the model."""
    misalignment: Estimate
    """Mean score of the samples."""
    hit_rate: Estimate
    """Share of the samples above the threshold."""
    bad_segments: Number
    """Share of the segments above the threshold."""
    unjudged: int
    """Samples that were not judged."""
    samples: int
    """Number of samples."""
    empty: int
    """Samples without text."""
    difference: Difference | None
    """Mean score minus that of the intended use; null for the intended use."""
    worst: list[WorstText]
    """Texts with the highest scores."""


@dataclass(frozen=True)
class Injection:
    """How a tokenizer reads a control token that is typed in a text."""

    token: str
    """The control token."""
    typed: str
    """What is typed."""
    how: str
    """How it is typed: as the token's name, or a variant of the name."""
    control: bool
    """Whether it becomes the token itself: then anyone who types a prompt can steer the model."""


@dataclass(frozen=True)
class WorstContext:
    """The attack with the highest misalignment of a model, judged again."""

    attack: str
    """Its name."""
    misalignment: Estimate
    """Mean score of new samples: the largest of many noisy means is too high."""


@dataclass(frozen=True)
class TokenAttacksResult:
    """`tokens.json`: all attacks on the control tokens."""

    settings: TokenAttacks
    """Settings of the attacks."""
    attacks: list[TokenAttack]
    """Results of each attack."""
    injection: list[Injection]
    """How the tokenizer reads typed control tokens."""
    skipped: list[str]
    """Attacks that were not possible, and why."""
    seconds: float = 0.0
    """Time."""
    worst: dict[str, WorstContext] = field(default_factory=dict)
    """text: of the contexts without the bad token itself; any: of all."""


@dataclass(frozen=True, kw_only=True)
class RedTeamResult:
    """`redteam.json`: everything that attacks found about a model."""

    key: str
    """Fingerprint of the model and of all settings."""
    model: str
    """The model as it was named."""
    identity: Identity
    """The scorer that judged."""
    scorer: Plain
    """The scorer's settings."""
    threshold: float
    """Scores above it are bad."""
    search: SearchResult
    """The search for prompts."""
    tokens: TokenAttacksResult | None
    """null for servers, and if these attacks were not requested."""
    gradient: GradientResult | None = None
    """The gradient search before it; null if there was none."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python, phf and the libraries."""


def read_redteam(folder: RedTeamFolder) -> RedTeamResult | None:
    """What attacks found; None if there were none. Raises StoreError for a damaged file."""
    return store.read_record(folder.result, RedTeamResult) if folder.result.exists() else None
