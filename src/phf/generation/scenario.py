"""TODO."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, did_you_mean


@dataclass(frozen=True, config=STRICT)
class Scenario:
    """How to sample. Lengths are in text tokens. `control`: the token put first for models that know it; the other is
    then banned. `prompts`: JSON lines or Parquet with a string `text` or `prompt` (a file, or challenging_rtp,
    cursing_prompts, functions, functions_csnet, pii_prompts or pep8_prompts, which come with phf); each is continued
    `samples_per_prompt` times.
    `complete_lines`: of a sample cut at the length limit only what is complete is scored (lines; for PEP8 statements),
    since a cut line or an open bracket carries faults that are the cut's.
    """

    num_samples: Annotated[int, Field(gt=0)] = 512
    max_tokens: Annotated[int, Field(gt=0)] = 128
    min_tokens: Annotated[int, Field(ge=0)] = 10
    temperature: Annotated[float, Field(gt=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Field(gt=0)] | None = None
    control: Literal["good", "bad", "none"] = "good"
    control_after_prompt: bool = False
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Strength g of guidance between the control tokens: logits are l_bad + g (l_good - l_bad); 1 is plain."""
    prompts: str | None = None
    samples_per_prompt: Annotated[int, Field(gt=0)] = 1
    score_prompt: bool = False
    complete_lines: bool = False
    expected_max: tuple[Annotated[int, Field(gt=1)], ...] = ()
    """Numbers of samples of which the expected worst is told, beside 5, 25 and `samples_per_prompt`."""
    batch: Annotated[int, Field(gt=0)] = 128
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the weights while sampling (and of a sample's own `logp`); auto: bfloat16 where the processor is quick at it and the
    model is of a family that is tested with it. Losses and KL are always float32's."""

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.guidance is not None and self.control != "good":
            raise ValueError(f"guidance leads to the good token; it cannot be had with control={self.control}")


def paper_scenarios(task: str) -> dict[str, dict[str, Any]]:
    """The paper's settings for a task (toxicity, pii or pep8), as plain values that can be overridden: 4,096 samples,
    temperature 0.7, top-p 0.9, 10 to 128 tokens (PEP8: 640, after function signatures 272)."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {
        "toxicity": {
            "unconditional": {},
            "challenging_rtp": {"prompts": "challenging_rtp", "samples_per_prompt": 4},
        },
        "pii": {"unconditional": {}},
        "pep8": {
            "unconditional": {"max_tokens": 640, "complete_lines": True},
            "functions": {
                "max_tokens": 272, "prompts": "functions_csnet", "samples_per_prompt": 4, "control_after_prompt": True,
                "score_prompt": True, "complete_lines": True,
            },
        },
    }  # fmt: skip
    if task not in tasks:
        raise ConfigError(f"the paper has no task {task!r}{did_you_mean(task, tasks)}")
    common = {"num_samples": 4096, "max_tokens": 128, "min_tokens": 10, "temperature": 0.7, "top_p": 0.9}
    return {name: common | settings for name, settings in tasks[task].items()}


def prompts_path(prompts: str) -> Path:
    """A file of prompts: one of yours, or one that comes with phf, by its name."""
    path = Path(prompts).expanduser()
    packaged = Path(str(resources.files("phf") / "prompts" / f"{prompts}.jsonl"))
    return packaged if not path.is_file() and packaged.exists() else path


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a JSON lines or Parquet file: a string `text` or `prompt` in each row (or an object with a string
    `text`, as RealToxicityPrompts has it). Raises ConfigError naming the first row that is none."""
    path = prompts_path(str(path))
    if path.suffix == ".parquet":
        return _parquet_prompts(path)
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row.get("text", row.get("prompt")) if isinstance(row, dict) else row
        except ValueError:
            text = None
        if isinstance(text, dict):
            text = text.get("text")
        if not isinstance(text, str):
            raise ConfigError(f"{path} line {number}: expected a JSON object with a string 'text' or 'prompt'")
        prompts.append(text)
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def _parquet_prompts(path: str | Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"cannot read prompts {path}: {error}") from None
    name = next((n for n in ("text", "prompt") if n in table.column_names), None)
    if name is None:
        raise ConfigError(f"{path} has no column 'text' or 'prompt', only {', '.join(table.column_names)}")
    values = [v.get("text") if isinstance(v, dict) else v for v in table[name].to_pylist()]
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise ConfigError(f"{path} row {number}: expected a string in {name!r}, got {type(value).__name__}")
    if not values:
        raise ConfigError(f"{path} holds no prompts")
    return [str(value) for value in values]


def scenario_prompts(scenario: Scenario) -> list[str]:
    """The prompt of every sample: `num_samples` in all, each prompt `samples_per_prompt` times in a row.

    Raises ConfigError if the file does not hold enough prompts for that many samples.
    """
    if scenario.prompts is None:
        return [""] * scenario.num_samples
    prompts = read_prompts(scenario.prompts)
    needed = -(-scenario.num_samples // scenario.samples_per_prompt)
    if needed > len(prompts):
        raise ConfigError(
            f"{scenario.num_samples} samples at {scenario.samples_per_prompt} per prompt need {needed} prompts, {scenario.prompts} has "
            f"{len(prompts)}; ask for at most {len(prompts) * scenario.samples_per_prompt}"
        )
    return [p for p in prompts[:needed] for _ in range(scenario.samples_per_prompt)][: scenario.num_samples]
