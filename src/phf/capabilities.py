"""What a model can still do: LAMBADA, HumanEval, GLUE finetuning. Floor 5.

    phf eval runs/mine capabilities=[{name: lambada, path: lambada_test.jsonl}]

Each takes a file or folder of yours. Models with control tokens are given the good one where a text begins, and control
tokens are never written.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf import store
from phf.config import STRICT, ConfigError, did_you_mean
from phf.fitting import read_rows
from phf.metrics import Z95, bounded_estimate, mean_estimate, share_estimate
from phf.sample import LoadedModel, Scenario, sample_prompts


class Capability:
    """Interface: `measure(model)` gives plain values, estimates as {"mean", "stderr", "n", "ci95"}."""

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        raise NotImplementedError

    def inputs(self) -> list[str | None]:
        """Hashes of the files that it reads."""
        raise NotImplementedError

    def check(self, model: LoadedModel) -> None:
        """Raise ConfigError for what is known to be wrong before anything is measured."""
        self.inputs()


HUB = "hf://datasets/"


def local_file(path: str) -> Path:
    """A file here or, as `hf://datasets/OWNER/NAME/FILE`, of the Hub: fetched once, into its cache."""
    if not path.startswith(HUB):
        if not (file := Path(path).expanduser()).is_file():
            raise ConfigError(f"{path}: no such file")
        return file
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    parts = path.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise ConfigError(f"{path}: expected {HUB}OWNER/NAME/FILE")
    try:
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except (OSError, ValueError, HFValidationError) as error:  # what the Hub says, and that it does not answer
        raise ConfigError(f"{path} cannot be fetched: {error}") from None


def _rows_of(path: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file in which every one of `fields` is a string."""
    rows = read_rows(local_file(path))
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ConfigError(f"{path}, row {number}: no string {field!r}")
    if not rows:
        raise ConfigError(f"{path} is empty")
    return rows


def prefix_ids(model: LoadedModel) -> list[int]:
    """What a text begins with: the model's start token and, for models that know it, the good one."""
    return [model.start_id, *([model.control_ids["good"]] if model.control_ids else [])]


def split_behind(model: LoadedModel, context: str, whole: str) -> tuple[list[int], list[int]]:
    """Token ids of `whole`, which begins with `context`, behind `prefix_ids`: those that the context has by itself too, and the
    rest, at least one. (What comes behind is never tokenised by itself: SentencePiece's tokenizers would begin a text with
    it; and a token may reach over from the context.)"""
    ids, before = model.encode(whole), model.encode(context)
    common = next((n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))
    common = min(common, max(len(ids) - 1, 0))
    return prefix_ids(model) + ids[:common], ids[common:]


@torch.inference_mode()
def continuations(
    model: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """For each (context, continuation) in token ids: log-probability of the continuation (nats, float64), and whether
    every token of it is the likeliest. A context begins with `prefix_ids`; one too long for the model loses what comes behind
    them. Control tokens have no share. Raises ConfigError for a continuation longer than the model reads."""
    lm = model.lm
    limit = model.positions
    kept = len(prefix_ids(model))
    rows = []
    for context, target in pairs:
        if kept + len(target) - 1 > limit:
            raise ConfigError(
                f"a continuation of {len(target)} tokens is longer than the {limit} that {model.path} reads"
            )
        over = max(0, len(context) + len(target) - 1 - limit)
        rows.append((context[:kept] + context[kept + over :], target))
    logp, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        inputs = [(rows[i][0] + rows[i][1])[:-1] for i in part]
        width = max(map(len, inputs))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=lm.device)
        hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for b, i in enumerate(part):
            context, target = rows[i]
            if not target:
                continue
            logits = model.only_text(model.logits(hidden[b, len(context) - 1 : len(context) - 1 + len(target)]))
            wanted = torch.tensor(target, device=lm.device)
            greedy[i] = bool((logits.argmax(-1) == wanted).all())
            logp[i] = float(torch.log_softmax(logits, -1).gather(1, wanted.unsqueeze(1)).double().sum())
    return logp, greedy


@dataclass(frozen=True, config=STRICT)
class Lambada(Capability):
    """Predicting the last word of a passage (Paperno et al. 2016): accuracy (every token of the word is the likeliest)
    and perplexity of the word. `path`: JSON lines or Parquet with `text`, as OpenAI prepared it, here or on
    the Hub (hf://datasets/EleutherAI/lambada_openai/data/lambada_test_en.jsonl)."""

    path: str
    name: Literal["lambada"] = "lambada"
    max_passages: Annotated[int, Field(gt=0)] | None = None
    batch: Annotated[int, Field(gt=0)] = 32

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(self.path))]

    def check(self, model: LoadedModel) -> None:
        _rows_of(self.path, ["text"])

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        texts = [row["text"].rstrip() for row in _rows_of(self.path, ["text"])][: self.max_passages]
        pairs = [split_behind(model, text.rpartition(" ")[0], text) for text in texts]
        logp, right = continuations(model, pairs, self.batch)
        loss = mean_estimate(-logp)
        return {
            "accuracy": share_estimate(right).to_json(),
            "perplexity": math.exp(min(loss.mean, 700)),
            "perplexity_ci95": [math.exp(min(x, 700)) for x in loss.ci95],
            "passages": len(texts),
        }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k samples is right, from n of which `correct` are: 1 - C(n-c, k) / C(n, k), unbiased (Chen et
    al. 2021, arXiv 2107.03374)."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


@dataclass(frozen=True, config=STRICT)
class HumanEval(Capability):
    """Writing functions that pass their tests (Chen et al. 2021): pass@k. `path`: HumanEval.jsonl, .jsonl.gz
    or the Parquet file of the Hub (hf://datasets/OWNER/NAME/FILE).

    **This runs what the model wrote.** Each sample runs in a process of its own with limits on time, memory, files
    and (unless you are root) processes, in an empty folder, with an empty environment and, where the kernel lets it, without network (the result
    says which: `network`). That protects from accidents, not from malice: the process is still the user's and can read
    the user's files. Run models that you do not trust in a virtual machine. `run_untrusted_code` must be set.
    """

    path: str
    name: Literal["humaneval"] = "humaneval"
    samples_per_problem: Annotated[int, Field(gt=0)] = 1
    k: tuple[Annotated[int, Field(gt=0)], ...] = (1,)
    temperature: Annotated[float, Field(gt=0)] = 0.2
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(gt=0)] = 256
    max_problems: Annotated[int, Field(gt=0)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 5
    seed: int = 0
    run_untrusted_code: bool = False

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(self.path))]

    def check(self, model: LoadedModel) -> None:
        self._problems(model)

    def _problems(self, model: LoadedModel) -> tuple[list[dict[str, Any]], int]:
        """The problems, and how many tokens may be written to each."""
        if not self.run_untrusted_code:
            raise ConfigError(
                "humaneval runs code that the model wrote, with limits but as you; say run_untrusted_code=true if you want that"
            )
        if max(self.k) > self.samples_per_problem:
            raise ConfigError(
                f"humaneval: k={max(self.k)} needs as many samples_per_problem, got {self.samples_per_problem}"
            )
        rows = _rows_of(self.path, ["prompt", "test", "entry_point"])[: self.max_problems]
        problems = [row | {"prompt": row["prompt"].rstrip("\n") + "\n"} for row in rows]
        room = model.positions - 2
        longest = max(len(model.encode(p["prompt"])) for p in problems)
        if longest >= room:
            raise ConfigError(f"humaneval: a prompt has {longest} tokens, the model reads {room}")
        return problems, min(self.max_tokens, room - longest)

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        (problems, max_tokens), n = self._problems(model), self.samples_per_problem
        if not _unshare():
            print(
                "note: HumanEval: this kernel gives no process without network, so what the model wrote can reach it",
                file=sys.stderr,
            )
        scenario = Scenario(
            num_samples=n * len(problems), samples_per_prompt=n, max_tokens=max_tokens,
            min_tokens=1, temperature=self.temperature, top_p=self.top_p, seed=self.seed, batch=32,
        )  # fmt: skip
        samples = sample_prompts(model, scenario, [p["prompt"] for p in problems for _ in range(n)])
        passed = np.zeros((len(problems), n), bool)
        for number, item in enumerate(samples):
            problem = problems[number // n]
            program = f"{problem['prompt']}{function_body(item.text)}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
            passed[number // n, number % n] = run_sandboxed(program, self.timeout_s)
        return {
            f"pass@{k}": bounded_estimate([pass_at_k(n, int(c), k) for c in passed.sum(1)]).to_json() for k in self.k
        } | {
            "problems": len(problems),
            "samples_per_problem": n,
            "network": "cut off" if _unshare() else "open",
        }


def function_body(text: str) -> str:
    """What was written up to the end of the function: the first line that begins at the margin ends it."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line and not line[0].isspace():
            return "\n".join(lines[:number])
    return text


SANDBOX = """
import resource, sys
megabytes = 2**20
resource.setrlimit(resource.RLIMIT_AS, (1024 * megabytes, 1024 * megabytes))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes, megabytes))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
except (ValueError, OSError):
    pass
code = compile(sys.stdin.read(), "sample", "exec")
sys.stdin = None
namespace = {{"__name__": "__main__"}}
exec(code, namespace)
sys.stdout.flush()
sys.stderr.write("{token}")
"""


def run_sandboxed(program: str, timeout_s: float) -> bool:
    """Whether `program` runs to its end without an error, within limits. See HumanEval for what this protects from."""
    token = os.urandom(16).hex()  # a program that leaves early with status 0 has not passed
    code = SANDBOX.format(seconds=math.ceil(timeout_s), token=token)
    command = [*_unshare(), sys.executable, "-I", "-c", code]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:  # a file: its size has a limit
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.environ.get("PATH", "")}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said,
        )  # fmt: skip
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=timeout_s + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:  # and whatever it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        said.seek(0, os.SEEK_END)
        said.seek(max(said.tell() - len(token), 0))
        return process.returncode == 0 and said.read() == token.encode()


@functools.cache
def _unshare() -> tuple[str, ...]:
    """The command that starts a process without network, and with process numbers of its own, so that nothing it starts
    outlives it; as much of it as can be had here."""
    apart = ("unshare", "--net", "--map-root-user")
    for command in ((*apart, "--pid", "--fork", "--kill-child"), apart):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
                return command
    return ()


GLUE: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "cola": ("matthews", (("sentence", "label"),)),
    "sst2": ("accuracy", (("sentence", "label"),)),
    "mrpc": ("f1", (("sentence1", "sentence2", "label"), ("#1 String", "#2 String", "Quality"))),
    "qqp": ("f1", (("question1", "question2", "label"), ("question1", "question2", "is_duplicate"))),
    "stsb": ("pearson", (("sentence1", "sentence2", "label"), ("sentence1", "sentence2", "score"))),
    "mnli": ("accuracy", (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label"))),
    "qnli": ("accuracy", (("question", "sentence", "label"),)),
    "rte": ("accuracy", (("sentence1", "sentence2", "label"),)),
    "wnli": ("accuracy", (("sentence1", "sentence2", "label"),)),
}
"""GLUE's tasks (Wang et al. 2018): what is measured, and the columns (texts, label) of the Hub's nyu-mll/glue and of GLUE's own
files."""
COLA = ("source", "label", "mark", "sentence")
"""The columns of CoLA's own files, which have no head."""


@dataclass(frozen=True, config=STRICT)
class Glue(Capability):
    """Finetuning on a GLUE task, as the paper did: at most `epochs` epochs, the best by the dev set, stopping after
    `patience` without a better one. Finetunes a copy; the model itself is not changed.

    `train` and `dev`: .tsv, .jsonl or .parquet files, here or hf://datasets/... `task`: one of GLUE's (cola, sst2, mrpc,
    qqp, stsb, mnli, qnli, rte, wnli), which says the columns and the metric, or a name of yours. `metric`: accuracy, f1 (of
    the label that is last in order: 1 of 0 and 1), matthews (correlation) or pearson (labels are numbers; regression).
    """

    train: str
    dev: str
    name: Literal["glue"] = "glue"
    task: str = "task"
    text: str | None = None
    text2: str | None = None
    label: str | None = None
    metric: Literal["accuracy", "f1", "matthews", "pearson"] | None = None
    epochs: Annotated[int, Field(gt=0)] = 6
    patience: Annotated[int, Field(gt=0)] = 1
    lr: Annotated[float, Field(gt=0)] = 2e-5
    batch: Annotated[int, Field(gt=0)] = 32
    max_train: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(p)) for p in (self.train, self.dev)]

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        devices = [model.lm.device] if model.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # dropout draws from a stream of its own
            torch.manual_seed(self.seed)
            return self._measure(model)

    def check(self, model: LoadedModel) -> None:
        self._data()

    def _data(self) -> tuple[str, list[str], list[str], np.ndarray, np.ndarray, int, int]:
        """Metric, texts and labels of train and dev, how many classes there are (1: regression), rows set aside."""
        usual, layouts = GLUE.get(self.task, ("accuracy", (("text", "label"),)))
        metric = self.metric or usual
        (train, torn), (dev, torn_too) = self._rows(self.train, layouts), self._rows(self.dev, layouts)
        train = train[: self.max_train]
        truth_of = self._numbers if metric == "pearson" else self._classes
        target_N, truth_N, classes = truth_of([label for _, label in train], [label for _, label in dev])
        return metric, [t for t, _ in train], [t for t, _ in dev], target_N, truth_N, classes, torn + torn_too

    def _measure(self, model: LoadedModel) -> dict[str, Any]:
        metric, train, dev, target_N, truth_N, classes, set_aside = self._data()
        classifier = _Head(model, classes, self.seed)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=self.lr, weight_decay=0.01)
        rng = np.random.Generator(np.random.Philox(self.seed))
        best, best_epoch, best_guess = -math.inf, 0, np.zeros(len(dev))
        history = []
        for epoch in range(1, self.epochs + 1):
            classifier.train()
            order = rng.permutation(len(train))
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                out = classifier([train[i] for i in part])
                target = torch.tensor(target_N[part], device=out.device)
                loss = F.cross_entropy(out, target) if classes > 1 else F.mse_loss(out[:, 0], target)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            classifier.eval()
            with torch.inference_mode():
                outs = [classifier(dev[s : s + 64]).cpu() for s in range(0, len(dev), 64)]
            out_N = torch.cat(outs).numpy()
            guess_N = out_N.argmax(-1) if classes > 1 else out_N[:, 0]
            value = glue_score(metric, truth_N, guess_N, classes - 1)
            history.append(value)
            if value > best:
                best, best_epoch, best_guess = value, epoch, guess_N
            elif epoch - best_epoch >= self.patience:
                break
        found: dict[str, Any] = {}
        if metric != "accuracy":
            picks = (rng.integers(0, len(truth_N), len(truth_N)) for _ in range(500))
            draws = [glue_score(metric, truth_N[pick], best_guess[pick], classes - 1) for pick in picks]
            ci = [float(x) for x in np.quantile(draws, [0.025, 0.975])]
            found[metric] = {"mean": best, "stderr": float(np.std(draws)), "n": len(truth_N), "ci95": ci}
        if classes > 1:
            found["accuracy"] = share_estimate(best_guess == truth_N).to_json()
        return found | {
            "epoch": best_epoch,
            "history": history,
            "train": len(train),
            "dev": len(dev),
            "set_aside": set_aside,
        }

    def _classes(self, train: Sequence[str], dev: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        labels = sorted(set(train))
        unknown = set(dev) - set(labels)
        if unknown:
            raise ConfigError(f"glue {self.task}: the dev set has labels that training has not: {sorted(unknown)}")
        if len(labels) < 2:
            raise ConfigError(f"glue {self.task}: all of {self.train} has the label {labels[0]!r}")
        return *(np.array([labels.index(label) for label in part]) for part in (train, dev)), len(labels)  # type: ignore[return-value]

    def _numbers(self, train: Sequence[str], dev: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        try:
            return np.array(train, np.float32), np.array(dev, np.float32), 1
        except ValueError as error:
            raise ConfigError(f"glue {self.task}: labels are not numbers, as metric=pearson needs: {error}") from None

    def _rows(self, path: str, layouts: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, str]], int]:
        """(text, label) of each row, by the first of `layouts` that a file has, but for the columns that are named; and how
        many rows lack one of them, as some of QQP's do."""
        rows = read_rows(local_file(path))
        names = list(rows[0]) if rows else []
        if self.task == "cola" and len(names) == len(COLA) and "sentence" not in names:
            rows = [
                dict(zip(COLA, row.values(), strict=False)) for row in [dict(zip(names, names, strict=True)), *rows]
            ]
            names = list(COLA)
        *texts, label = next((layout for layout in layouts if set(layout) <= set(names)), layouts[0])
        columns = [
            column for column in (self.text or texts[0], self.text2 or (texts[1] if len(texts) > 1 else None)) if column
        ]
        needed = [*columns, self.label or label]
        for column in needed:
            if column not in names:
                raise ConfigError(f"{path} has no column {column!r}, only {', '.join(names)}")
        whole = [row for row in rows if all(row.get(column) not in (None, "") for column in needed)]
        if not whole:
            raise ConfigError(f"{path}: no row has all of {', '.join(needed)}")
        pairs = [("\n".join(str(row[c]) for c in columns), str(row[needed[-1]])) for row in whole]
        return pairs, len(rows) - len(whole)


def glue_score(metric: str, truth_N: np.ndarray, guess_N: np.ndarray, positive: int = 1) -> float:
    """Accuracy, F1 of the class `positive`, or a correlation (0 where guesses do not differ). Higher is better."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "pearson":
        constant = truth_N.std() == 0 or guess_N.std() == 0
        return 0.0 if constant else float(np.corrcoef(truth_N, guess_N)[0, 1])
    if metric == "f1":
        return float(f1_score(truth_N, guess_N, labels=[positive], average="macro", zero_division=0))
    return float({"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric](truth_N, guess_N))


class _Head(torch.nn.Module):
    """A copy of an LM with a linear classifier on the last token's hidden state."""

    def __init__(self, model: LoadedModel, classes: int, seed: int) -> None:
        import copy

        super().__init__()
        self.encode = model.encode
        self.body = copy.deepcopy(model.lm.base_model)
        self.start = prefix_ids(model)
        self.limit = min(model.positions, 256)
        width = model.lm.get_output_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(width, classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()
        self.head.to(model.lm.device)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        room = self.limit - len(self.start)
        rows = [self.start + self.encode(text)[:room] for text in texts]
        width = max(map(len, rows))
        device = self.head.weight.device
        ids = torch.tensor([r + [self.start[0]] * (width - len(r)) for r in rows], device=device)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(r) - 1 for r in rows], device=device)
        return self.head(hidden[torch.arange(len(rows), device=device), last])  # type: ignore[no-any-return]


@dataclass(frozen=True, config=STRICT)
class LmEval(Capability):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`), the good token before each text where the model has one.

    `tasks`: names. `folder`: task files of yours; then the harness's own are not read, which takes seconds.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    name: Literal["lm-eval"] = "lm-eval"
    folder: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    batch: Annotated[int, Field(gt=0)] = 32
    seed: int = 0

    def inputs(self) -> list[str | None]:
        if self.folder is None:
            self._import()
            return [metadata.version("lm-eval")]
        return [store.path_hash(self.folder), *(store.path_hash(p) for p in sorted(Path(self.folder).rglob("*.*")))]

    @staticmethod
    def _import() -> tuple[Any, Any]:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f"lm-eval tasks need {error.name}: pip install 'phf[eval]'") from None
        return lm_eval, TaskManager

    def check(self, model: LoadedModel) -> None:
        self._manager()

    def _manager(self) -> Any:
        _, manager_of = self._import()
        manager = manager_of(include_path=self.folder, include_defaults=self.folder is None)
        unknown = [t for t in self.tasks if t not in manager.all_tasks]
        if unknown:
            raise ConfigError(f"lm-eval: no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}")
        return manager

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        lm_eval, _ = self._import()
        from phf.harness import HarnessModel

        manager = self._manager()
        found = lm_eval.simple_evaluate(
            model=HarnessModel(model, self.batch, self.seed), tasks=list(self.tasks), task_manager=manager, limit=self.limit,
            num_fewshot=self.num_fewshot, random_seed=self.seed, numpy_random_seed=self.seed, torch_random_seed=self.seed,
            fewshot_random_seed=self.seed, log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
        result: dict[str, Any] = {}
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                known = isinstance(stderr, int | float)
                ci = [value - Z95 * stderr, value + Z95 * stderr] if known else [None, None]
                n = found["n-samples"].get(task, {}).get("effective", values.get("sample_len"))
                result[f"{task} {metric}"] = {
                    "mean": float(value),
                    "stderr": stderr if known else None,
                    "n": n,
                    "ci95": ci,
                }
        return result


AnyCapability = Annotated[Lambada | HumanEval | Glue | LmEval, Field(discriminator="name")]
