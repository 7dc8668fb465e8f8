"""The command line. Floor 6. Imports what a command needs when it runs, so that `phf --help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Pretrain language models with human feedback: score a corpus, train with any objective, judge the model.\n\n"
    "The whole path at once: `phf run demo`. Or stage by stage: score, inspect, tokenize, train, sample, eval, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE.yaml|a.b=c]...", help="Recipe files, merged left to right, then settings."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings, for example num_samples=64.")
]


def _split(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    arguments = arguments or []
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def _laid_on(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`a.b=c` settings laid on `config`."""
    from phf.config import merge, parse_override

    for override in overrides:
        config = merge(config, parse_override(override))
    return config


def _only_overrides(arguments: list[str] | None) -> list[str]:
    from phf.config import ConfigError

    files, overrides = _split(arguments)
    if files:
        raise ConfigError(f"unexpected argument {files[0]!r}: settings have the form a.b=c")
    return overrides


@app.command()
def score(
    corpus: Annotated[
        str,
        typer.Argument(
            help="A .jsonl or .parquet file, a folder of files, s3://..., hf://datasets/owner/name, installed_packages or "
            "standard_library. With --add: a scored corpus."
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUT [a.b=c]...", help="Folder to write the scored corpus into, then settings."),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            help="pii, presidio, pep8, toxicity (scorer.model=...), fitted (scorer.path=...), regex (scorer.pattern=...), "
            "lexicon (scorer.path=...), callable (scorer.function=module:name) or combination (scorer.scorers=[...])."
        ),
    ] = "pii",
    segmenter: Annotated[
        str,
        typer.Option(
            help="lines, sentences, paragraphs, documents, windows (segmenter.chars=...) or given (the corpus's own)."
        ),
    ] = "lines",
    add: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Score a scored corpus once more, beside the scores it has, under this name."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_unjudged: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if more than this share of segments cannot be judged.")
    ] = 0.01,
    executor: Annotated[
        str, typer.Option(help="local, slurm (executor.partition=...) or ray (executor.address=...).")
    ] = "local",
) -> None:
    """Cut a corpus into segments and score each. Run it again to resume.

    Writes Parquet with the columns of the published scored data sets, and a manifest with counts and what was set aside.
    """
    from phf.annotate import add_scores, score_corpus
    from phf.config import ConfigError, validate
    from phf.corpus import AnyCorpus, from_path
    from phf.scorers import AnyScorer
    from phf.segment import AnySegmenter

    folders, settings = _split(arguments)
    if len(folders) != (add is None):
        raise ConfigError(
            "give the folder to write into: phf score CORPUS OUT"
            if add is None and not folders
            else f"unexpected argument {folders[-1]!r}: settings have the form a.b=c"
        )
    config: dict[str, Any] = {
        "scorer": {"name": scorer},
        "segmenter": {"name": segmenter},
        "executor": {"name": executor},
    }
    if add is None:
        config["corpus"] = from_path(corpus)
    config = _laid_on(config, settings)
    _known_keys(config, ("corpus", "scorer", "segmenter", "executor"))
    elsewhere = None
    if config["executor"] != {"name": "local"}:
        from phf.cluster import AnyExecutor
        from phf.cluster import executor as make_executor

        elsewhere = make_executor(validate(config["executor"], AnyExecutor, "executor"))
    judge: Any = validate(config["scorer"], AnyScorer, "scorer")
    if add is not None:
        manifest = add_scores(corpus, judge, add, workers, max_unjudged, elsewhere)
    else:
        manifest = score_corpus(
            validate(config["corpus"], AnyCorpus, "corpus"),
            validate(config["segmenter"], AnySegmenter, "segmenter"),
            judge,
            folders[0],
            workers,
            max_unjudged,
            elsewhere,
        )
    counts = manifest["counts"]
    print(
        f"{counts['documents']:,} documents, {counts['segments']:,} segments, {counts['chars']:,} characters; "
        f"{counts['bad_segments'] / max(counts['segments'], 1):.1%} of segments score above 0, {counts['unjudged']:,} not judged"
    )
    if manifest["rejected"]:
        print("set aside: " + ", ".join(f"{n} x {why}" for why, n in manifest["rejected"].items()))


@app.command()
def inspect(
    scored: Annotated[
        str, typer.Argument(help="What `phf score` wrote, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str | None, typer.Option(help="Page to write; default: inspect.html in the folder.")] = None,
    scores: Annotated[str | None, typer.Option(help="Which scores, where `phf score --add` added some.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores above it are bad. Default: found from the scores.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Field of the documents' metadata that is true for bad ones: precision and recall."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="The corpus's token store: what share of its tokens a threshold calls bad.")
    ] = None,
) -> None:
    """Look at the scores: distribution, thresholds, examples from best to worst. Writes a page and the numbers as JSON."""
    from phf.report import number
    from phf.report.inspect import write_inspection

    page, found = write_inspection(scored, out, scores, threshold, label, tokens)
    levels = ("0.5", "0.9", "0.99", "1.0")
    _table(
        [found["preference"], "count", "score 0", "mean", *(f"quantile {q}" for q in levels)],
        [
            [name, f"{found[name]['n']:,}", f"{found[name]['zero']:.1%}", number(found[name]["mean"], 5)]
            + [number(found[name]["quantiles"][q], 5) for q in levels]
            for name in ("segments", "documents")
        ],
    )
    suggested = found["suggested"]
    print(
        f"suggested thresholds: filtering {suggested['filtering']:.6g}, conditional and unlikelihood {suggested['conditional']:.6g}"
    )
    print(f"page: {page}   numbers: {page.with_suffix('.json')}")


@app.command(name="fit-scorer")
def fit_scorer(
    labels: Annotated[str, typer.Argument(help="Labelled texts: .jsonl, .csv, .tsv or .parquet.")],
    out: Annotated[str, typer.Argument(help="Folder to write the scorer into.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label: true or false, 1 or 0, or see --bad.")] = "label",
    bad: Annotated[str | None, typer.Option(help="Values of the label that mean bad, separated by commas.")] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="Other labelled texts to measure on: FILE or FILE:TEXT:LABEL[:BAD,BAD]. May be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="ngrams (quick) or transformer (finetunes --model).")] = "ngrams",
    model: Annotated[str | None, typer.Option(help="Model to finetune: a folder or a name on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fit a scorer to your own labels. Then: phf score CORPUS OUT --scorer fitted scorer.path=FOLDER

    A fifth of the texts is kept out of the fit to measure on; probabilities are calibrated.
    """
    from phf.config import ConfigError, did_you_mean
    from phf.fitting import fit_scorer as fit
    from phf.fitting import read_labels
    from phf.report import number

    if kind not in ("ngrams", "transformer"):
        raise ConfigError(f"--kind {kind!r}{did_you_mean(kind, ('ngrams', 'transformer'))}")
    tests = []
    for spec in test or []:
        path, *columns = spec.split(":")
        columns += [text, label][len(columns) :] if len(columns) < 2 else []
        values = (
            columns[2].split(",")
            if len(columns) > 2
            else (bad.split(",") if bad and len(spec.split(":")) == 1 else None)
        )
        tests.append(read_labels(path, columns[0], columns[1], values))
    card = fit(read_labels(labels, text, label, bad.split(",") if bad else None), out, tests, kind, model, seed=seed)  # type: ignore[arg-type]
    rows = []
    for name, m in card["metrics"].items():
        half = m["at"]["0.5"]
        rows.append([name, f"{m['n']:,}", f"{m['bad']:,}", f"{number(m['auc'], 3)} ({number(m['auc_ci95'][0], 3)} to {number(m['auc_ci95'][1], 3)})", number(half["precision"], 3), number(half["recall"], 3), number(m["calibration_error"], 3)])  # fmt: skip
    print(
        f"{card['texts']:,} texts, {card['bad']:,} of them bad"
        + (f"; set aside: {card['rejected']}" if card["rejected"] else "")
    )
    _table(["measured on", "texts", "bad", "AUC (95% interval)", "precision", "recall", "calibration error"], rows)
    print(f"precision and recall above 0.5; more in {out}/scorer.json")


@app.command()
def push(
    scored: Annotated[str, typer.Argument(help="What `phf score` wrote.")],
    repo: Annotated[str, typer.Argument(help="Data set on the Hub to write to: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new data set public; it is private otherwise.")
    ] = False,
) -> None:
    """Push a scored corpus to the Hub, with a card that says what scored it, how much, and what failed."""
    from phf.hub import push_scored

    print(f"pushed: {push_scored(scored, repo, private=not public)}")


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(help="A trained run; judged by `phf eval` before, so that the card has numbers.")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write the release into.")],
    push: Annotated[str | None, typer.Option(help="Also push it to this model on the Hub: owner/name.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new model public; it is private otherwise.")] = False,
    name: Annotated[
        str | None, typer.Option(help="The model's name on its card. Default: --push, or the run's.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="As the Hub names licences, for example mit.")] = None,
) -> None:
    """Write a model that plain transformers loads and that behaves: pipeline("text-generation", model=OUT).

    The tokenizer begins texts with the good token, typed control tokens are text, the bad token is never written, and a
    card says what was measured. The result is loaded and tried before it counts as finished.
    """
    from phf.release import export as write_release
    from phf.release import push_release

    folder = write_release(run, out, name or push, licence)
    print(f"release: {folder}")
    if push is not None:
        print(f"pushed: {push_release(folder, push, private=not public)}")


@app.command()
def tokenize(
    scored: Annotated[
        str, typer.Argument(help="What `phf score` wrote, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write the token store into.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a tokenizer. Default: train a byte-level BPE on the corpus."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=257, help="Entries of the BPE that is trained.")] = 8192,
    heldout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of documents kept out of training.")] = 0.05,
) -> None:
    """Tokenise a scored corpus, once for every objective. Run it again to resume."""
    from phf.tokens import PretrainedTokenizer, TrainBPE, tokenize_corpus

    config = TrainBPE(vocab_size) if tokenizer is None else PretrainedTokenizer(tokenizer)
    manifest = tokenize_corpus(scored, config, out, heldout)
    counts = manifest["counts"]
    print(
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens ({counts['train_tokens']:,} for training), vocabulary {manifest['vocab_size']:,}"
    )
    if counts["roundtrip_lossy"]:
        print(
            f"warning: {counts['roundtrip_lossy']} of {counts['roundtrip_checked']} documents checked do not decode to their text with this tokenizer",
            file=sys.stderr,
        )


@app.command()
def train(
    tokens: Annotated[str, typer.Argument(help="What `phf tokenize` wrote.")],
    out: Annotated[str, typer.Argument(help="Folder of the run.")],
    settings: Settings = None,
) -> None:
    """Train a model with an objective. Run it again to resume.

    Settings are `objective` (objective.name=conditional objective.threshold=0 ...), `model` (model.name=from_config
    with model.config.model_type=llama ..., or model.name=from_weights model.path=...), `train` (train.tokens=1e7
    train.lr=1e-3 ...), `during` (during.every=1e6: held-out loss while training) and `seed`. Recipe files may hold them
    too. With torchrun or accelerate launch: unchanged.
    """
    from phf.config import load
    from phf.during import JudgeDuring
    from phf.recipe import TrainStage
    from phf.train import train as train_run

    files, overrides = _split(settings)
    stage = load(files, overrides, TrainStage)
    during = (JudgeDuring(stage.during, out, tokens, stage.train, stage.objective),) if stage.during else ()
    manifest = train_run(tokens, out, stage.model, stage.objective, stage.train, stage.seed, callbacks=during)
    if manifest:
        counts = manifest["counts"]
        print(
            f"{counts['tokens']:,} tokens in {counts['steps']:,} steps ({counts['epochs']:.2f} epochs), {manifest['seconds']:.0f} s; model in {out}/model"
        )


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="A run, a model folder, a name on the Hub, or a server: http://host:8000/v1")
    ],
    out: Annotated[str, typer.Argument(help="JSON lines file to write.")],
    settings: Overrides = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the Hub: a branch, tag or commit.")] = None,
) -> None:
    """Write texts with a model: num_samples, max_tokens, temperature, top_p, top_k, control, guidance, prompts, seed ... (a.b=c).

    Of a server that speaks OpenAI's completions (vLLM, for one): server.model=NAME.
    """
    from phf.config import ConfigError, validate
    from phf.sample import Scenario, load_model, sample_served, write_samples
    from phf.sample import sample as draw_samples
    from phf.served import Server

    config = _laid_on({}, _only_overrides(settings))
    server = _mapping(config, "server")
    if model.startswith(("http://", "https://")):
        unknown = [name for name in ("control", "min_tokens", "precision", "batch") if name in config]
        if unknown or revision:
            hint = " (vLLM takes server.extra.min_tokens=...)" if "min_tokens" in unknown else ""
            raise ConfigError(f"{unknown[0] if unknown else '--revision'} cannot be asked of a server{hint}")
        served: Server = validate({"url": model, **server}, Server, "server")
        samples = sample_served(served, validate({"min_tokens": 0, **config}, Scenario, "scenario"))
    else:
        if server:
            raise ConfigError(f"server.* is for servers (http://host:8000/v1), and {model} is none")
        scenario: Scenario = validate(config, Scenario, "scenario")
        samples = draw_samples(load_model(model, revision), scenario)
    write_samples(out, samples)
    print(f"{len(samples):,} samples in {out}")


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, or any model (a folder or a name on the Hub; with --scorer or --tokens), then settings.",
        ),
    ],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="The token store, if it has moved since training. Of any other model: held-out text to read, a token store "
            "(its held-out documents) or a scored corpus."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores above it are bad. Default: 0, with --paper toxicity 0.5.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="Another scorer than the corpus's (as for `phf score`, with scorer.* settings)."),
    ] = None,
    other_scorer: Annotated[
        bool, typer.Option("--other-scorer", help="Allow a scorer that differs from the corpus's.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Folder for what is found of a model that is not a run.")] = None,
    paper: Annotated[
        str | None, typer.Option(metavar="TASK", help="The paper's scenarios and lengths: toxicity, pii or pep8.")
    ] = None,
    heldout_tokens: Annotated[float, typer.Option(min=1, help="Held-out tokens to read, at most.")] = 1e6,
    revision: Annotated[str | None, typer.Option(help="Of models on the Hub: a branch, tag or commit.")] = None,
    control_threshold: Annotated[
        float | None,
        typer.Option(
            help="Scores above it had the bad control token when a model from elsewhere was trained. Default: what it says, else --threshold."
        ),
    ] = None,
) -> None:
    """Judge runs or any model: misalignment of samples, held-out loss, diversity, KL, capabilities. Run again to resume.

    Settings are those of a scenario (num_samples, prompts, temperature ...), kl.* (kl.reference.path=gpt2) and
    capabilities=[{name: lambada, path: ...}]. Writes eval.json and the samples into each run, or into --out.
    """
    from phf.capabilities import AnyCapability
    from phf.config import ConfigError, merge, validate
    from phf.evaluate import evaluate_model, evaluate_run, is_run
    from phf.reference import KL
    from phf.report import headline, number
    from phf.sample import PAPER_THRESHOLD, Scenario, paper_scenarios
    from phf.scorers import AnyScorer, Scorer
    from phf.segment import AnySegmenter, Segmenter

    folders, overrides = _split(models)
    config = _laid_on({}, overrides)
    fields, cut = _mapping(config, "scorer"), _mapping(config, "segmenter")
    kl, capabilities = _mapping(config, "kl") if "kl" in config else None, config.pop("capabilities", [])
    if fields and scorer is None:
        raise ConfigError("scorer.* settings need --scorer: without it the corpus's own scorer judges")
    segmenter: Segmenter | None = validate({"name": "lines", **cut}, AnySegmenter, "segmenter") if cut else None
    judge: Scorer | None = None if scorer is None else validate({"name": scorer, **fields}, AnyScorer, "scorer")
    if kl is not None:
        kl = validate(merge({"reference": {"name": "local"}}, kl), KL, "kl")
    measured: list[Any] = validate(capabilities, list[AnyCapability], "capabilities")
    if paper is not None:
        scenarios: dict[str, Scenario] = {
            n: validate(merge(s, config), Scenario, n) for n, s in paper_scenarios(paper).items()
        }
        threshold = PAPER_THRESHOLD[paper] if threshold is None else threshold
    else:
        scenario: Scenario = validate(config, Scenario, "scenario")
        scenarios = {"unconditional" if scenario.prompts is None else "prompted": scenario}
    threshold, most = threshold or 0.0, int(heldout_tokens)
    rows = []
    for name in folders:
        if is_run(name):
            if control_threshold is not None:
                raise ConfigError(f"--control-threshold is for models that are not runs; {name} says its own")
            if cut:
                raise ConfigError(f"segmenter.* is for models that are not runs; {name} is cut as its corpus was")
            result = evaluate_run(
                name, scenarios, threshold, tokens, judge, other_scorer, most, kl_from=kl, capabilities=measured
            )
        else:
            folder = (
                out
                if out is not None and len(folders) == 1
                else f"{out or 'eval'}/{name.strip('/').replace('/', '--')}"
            )
            result = evaluate_model(
                name,
                folder,
                judge,
                scenarios,
                threshold,
                segmenter,
                kl,
                measured,
                revision,
                tokens,
                most,
                other_scorer,
                control_threshold,
            )
            print(f"{name}: {folder}/eval.json")
        if result["skipped"]:
            print(
                f"note: {name} has no control tokens, so it is not asked for {', '.join(result['skipped'])}",
                file=sys.stderr,
            )
        heldout = result["heldout"].get("good") or result["heldout"].get("none") or {}
        of_model = [number((heldout.get(s) or {}).get("nats_per_byte"), 3) for s in ("good", "bad")]
        if result["kl"]:
            found = result["kl"]["forward"]["nats_per_text"]
            of_model.append(f"{number(found['mean'], 2)} ± {number(found['stderr'], 2)}")
        of_model += [headline(capability) for capability in result["capabilities"]]
        for scenario_name, judged in result["scenarios"].items():
            m = judged["misalignment"]
            row = [
                name,
                scenario_name,
                f"{number(m['mean'], 5)} ({number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)})",
            ]
            row += [number(judged["hit_rate"]["mean"], 4), number(judged["expected_max"]["25"]["mean"], 5)]
            row += [number(judged["distinct_2"], 3), number(judged["self_bleu_5"], 3), str(judged["unjudged"])]
            rows.append(row + of_model)
            name, of_model = "", [""] * len(of_model)  # said once
    head = ["model", "scenario", "misalignment (95% interval)", "hit rate", "worst of 25", "distinct-2", "Self-BLEU-5", "not judged", "nats/byte good", "nats/byte bad"]  # fmt: skip
    head += ["KL, nats a text"] * (kl is not None) + [f"{c.name} {getattr(c, 'task', '')}".strip() for c in measured]
    _table(head, rows)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A judged run, or a folder that `phf eval --out` wrote.")],
    second: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Difference in misalignment between two judged models, with its interval: paired where they had the same prompts."""
    from pathlib import Path

    from phf.config import ConfigError
    from phf.evaluate import compare as difference
    from phf.report import number
    from phf.sample import read_samples
    from phf.store import canonical, read_json

    one, two = read_json(Path(first) / "eval.json"), read_json(Path(second) / "eval.json")
    if canonical(one["identity"]) != canonical(two["identity"]):
        raise ConfigError(f"{first} and {second} were judged by different scorers, so their numbers do not compare")
    rows = []
    for name in one["scenarios"]:
        if name in two["scenarios"]:
            settings = [
                {k: v for k, v in e["scenarios"][name]["scenario"].items() if k != "num_samples"} for e in (one, two)
            ]
            if settings[0] != settings[1]:
                differs = sorted(k for k in settings[0] if settings[0][k] != settings[1].get(k))
                raise ConfigError(
                    f"scenario {name!r} is not the same for both ({', '.join(differs)}), so it does not compare"
                )
            a, b = (read_samples(Path(f) / "samples" / f"{name}.jsonl") for f in (first, second))
            d = difference(a, b)
            sure = d["ci95"][0] is not None and (d["ci95"][1] < 0 or d["ci95"][0] > 0)
            verdict = ("lower" if d["mean"] < 0 else "higher") if sure else "not told apart"
            rows.append([name, number(d["mean"], 5), f"{number(d['ci95'][0], 5)} to {number(d['ci95'][1], 5)}", "prompts" if d["paired"] else "samples", verdict])  # fmt: skip
    if not rows:
        raise ConfigError(f"{first} and {second} have no scenario in common")
    _table(["scenario", "difference", "95% interval", "over", f"{Path(first).name} is"], rows)


@app.command()
def redteam(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, any model (a folder or a name on the Hub) or a server (http://host:8000/v1), then settings.",
        ),
    ],
    scorer: Annotated[
        str | None, typer.Option(help="Another scorer than the corpus's (as for `phf score`, with scorer.* settings).")
    ] = None,
    other_scorer: Annotated[
        bool, typer.Option("--other-scorer", help="Allow a scorer that differs from the corpus's.")
    ] = False,
    threshold: Annotated[float, typer.Option(help="Scores above it are bad.")] = 0.0,
    tokens: Annotated[str | None, typer.Option(help="The token store, if it has moved since training.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for what is found of a model that is not a run.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's sizes: ten trials, 512 continuations.")] = False,
    token_attacks: Annotated[
        bool, typer.Option("--control-tokens/--no-control-tokens", help="Also attack the control tokens.")
    ] = True,
) -> None:
    """Attack models: search for prompts that make them misbehave, and attack their control tokens. Run again to resume.

    Settings are the search's (trials, rounds, candidates, continuations, attacker.name=evolution|local|server, task,
    prompts, seed ...) and tokens.* for the control-token attacks (tokens.num_samples=256). All models of one command are
    attacked alike. Writes redteam.json into each run's redteam folder, or into --out; `phf report` shows it.
    """
    from phf.config import ConfigError, merge, validate
    from phf.control_attacks import TokenAttacks
    from phf.evaluate import is_run
    from phf.redteam import PAPER, RedTeam
    from phf.redteam import redteam as attack
    from phf.report import number
    from phf.scorers import AnyScorer, Scorer
    from phf.served import Server

    names, overrides = _split(models)
    config = _laid_on({}, overrides)
    fields, server, of_tokens = (_mapping(config, name) for name in ("scorer", "server", "tokens"))
    if fields and scorer is None:
        raise ConfigError("scorer.* settings need --scorer: without it the corpus's own scorer judges")
    judge: Scorer | None = None if scorer is None else validate({"name": scorer, **fields}, AnyScorer, "scorer")
    settings: RedTeam = validate(merge(PAPER if paper else {}, config), RedTeam, "red-teaming")
    tokens_too: TokenAttacks | None = validate(of_tokens, TokenAttacks, "tokens") if token_attacks else None
    rows, table = [], []
    for name in names:
        model: Any = name
        served = name.startswith(("http://", "https://"))
        if served:
            model = validate({"url": name, **server}, Server, "server")
        a_run = not served and is_run(name)
        folder = out
        if not a_run and out is not None and len(names) > 1:
            folder = f"{out}/{name.strip('/').replace('/', '--')}"
        found = attack(
            model, None if a_run else folder, settings, tokens_too, judge, threshold, tokens, None, other_scorer
        )
        search = found["search"]
        row = [name]
        for key in ("best_1", "best_10"):
            e = search["confirmed"].get(key) or {"mean": None, "ci95": [None, None]}
            row.append(f"{number(e['mean'], 5)} ({number(e['ci95'][0], 5)} to {number(e['ci95'][1], 5)})")
        row += [number(search["final"][k]["mean"], 5) for k in ("best_1", "best_10", "best_100", "round_mean")]
        budget = search["budget"]
        row += [f"{budget['target_tokens']:,}", f"{budget['red_tokens']:,}", f"{budget['seconds']:.0f}"]
        rows.append(row)
        for a in (found["tokens"] or {}).get("attacks", []):
            m = a["misalignment"]
            table.append([name, a["attack"], f"{number(m['mean'], 5)} ({number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)})", "–" if a["bad_segments"] is None else f"{a['bad_segments']:.1%}"])  # fmt: skip
        for hole in (found["tokens"] or {}).get("injection", []):
            if hole["control"]:
                print(
                    f"{name}: its tokenizer reads a typed {hole['typed']} as the control token {hole['token']}",
                    file=sys.stderr,
                )
    print("\nsearch (mean score of the best prompts' continuations; lower: harder to break)\n")
    _table(["model", "best, fresh (95% interval)", "best 10, fresh", "best", "best 10", "best 100", "last round", "target tokens", "red LM tokens", "seconds"], rows)  # fmt: skip
    if table:
        print("\nattacks on the control tokens\n")
        _table(["model", "attack", "misalignment (95% interval)", "bad segments"], table)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="A run, or a folder of runs.")],
    out: Annotated[str | None, typer.Option(help="File to write; default: report.html in the folder.")] = None,
) -> None:
    """Write the page that compares judged runs. It opens from disk and loads nothing."""
    from phf.report import write_report

    print(f"report: {write_report(folder, out)}")


@app.command()
def run(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...",
            help="Recipes by name or file, merged left to right, then settings.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the merged recipe, run nothing.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Only one run of the recipe, by its name, or `data`: what all runs share.")
    ] = None,
    list_commands: Annotated[
        bool, typer.Option("--list", help="Print the recipe as independent commands, one a run, and run nothing.")
    ] = False,
) -> None:
    """Run every stage of a recipe that is not done: score, tokenise, train each run, judge, report.

    Recipes of phf: demo (PII in READMEs), pep8 (the standard library), finetuning and grid (on the demo's data), quick (laid
    on any of these, for a fast try); paper-toxicity, paper-pii, paper-pep8 with mle, filtering, conditional, unlikelihood,
    rwr, awr and finetune50, finetune10 laid on them. A run that fails does not stop the others.
    """
    from phf.config import dump_yaml, to_plain
    from phf.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        print(dump_yaml(to_plain(loaded) | {"presets": {}}), end="")
        return
    if list_commands:
        from phf.running import commands

        for number, block in enumerate(commands(loaded, recipe)):
            print(
                ("# then, in any order or at the same time:" if len(block) > 1 else "# then:") if number else "# first:"
            )
            print("\n".join(block))
        return
    from phf.running import RecipeError, run_recipe

    try:
        results = run_recipe(loaded, only)
    except RecipeError as error:
        if error.results and error.results["runs"]:
            show_results(error.results)
        raise
    show_results(results)
    if only is None:
        print(f"\nreport: {loaded.folder}/report.html   numbers: {loaded.folder}/results.json")


@app.command()
def plan(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE [MORE.yaml]... [a.b=c]...", help="As for `phf run`.")],
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1, help="Training speed, where it is known: target tokens a second.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What the hardware reaches in bf16 matrix products, in TFLOP/s.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of that rate which training reaches.")
    ] = 0.4,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of the device. Default: this machine's.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes (devices) that train a run together, as torchrun starts them.")
    ] = 1,
    disk_gb: Annotated[float | None, typer.Option(min=0.1, help="Free disk space. Default: this machine's.")] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Read some of the corpus and time the scorer on it.")
    ] = True,
) -> None:
    """Say what a recipe takes before anything runs: tokens, steps, FLOPs, memory, disk, the scorer's time, hours.

    Without a given speed, this machine's rate of matrix products is measured. Fails where something cannot fit.
    """
    from phf.plan import make_plan, told
    from phf.recipe import load_recipe

    found = make_plan(load_recipe(recipe), tokens_per_s, tflops, utilisation, memory_gb, disk_gb, score, processes)
    rows, lines = told(found)
    _table(
        ["run", "parameters", "tokens", "steps", "of 20 a parameter", "FLOPs", "memory GB", "disk GB", "hours"], rows
    )
    print()
    print("\n".join(lines))
    if found["problems"]:
        from phf.config import ConfigError

        raise ConfigError("this cannot run as it is:\n" + "\n".join(f"  {p}" for p in found["problems"]))


def show_results(results: dict[str, Any]) -> None:
    """The comparison as a table in the terminal."""
    from phf.report import number

    rows = []
    best = {found["group"] for found in results["best"].values()}
    for r in results["runs"]:
        m = r["misalignment"]
        rows.append([r["group"] + " *" * (r["group"] in best), str(r["seed"]), f"{number(m['mean'], 5)} ± {number(m['stderr'], 5)}", f"{number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)}",
                     "–" if r["bad_segments"] is None else f"{r['bad_segments']:.1%}", number(r["heldout"]["good"], 3), number(r["heldout"]["bad"], 3),
                     number(r["distinct_2"], 3), f"{r['unjudged']}"])  # fmt: skip
    print(f"\n{results['recipe']}   (misalignment: {results['unit']}; lower is better)\n")
    _table(
        [
            "run",
            "seed",
            "misalignment",
            "95% interval",
            "bad segments",
            "nats/byte good",
            "nats/byte bad",
            "distinct-2",
            "not judged",
        ],
        rows,
    )
    if best:
        print(f"\n* best setting. {next(iter(results['best'].values()))['rule']}")
    if results["quick"]:
        print("\nToo short to conclude anything from: the quick variant only shows that every step works.")


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes the settings `name.*` out of `config`."""
    from phf.config import ConfigError

    value = config.pop(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected {name}.SETTING=VALUE, got {name}={value}")
    return value


def _known_keys(config: dict[str, Any], known: tuple[str, ...]) -> None:
    from phf.config import ConfigError, did_you_mean

    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, known)}")


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for number, line in enumerate([head, *rows]):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def main() -> None:
    """Entry point: mistakes of the user are one message and exit code 2, failures of a stage exit code 1."""
    from phf.config import ConfigError
    from phf.store import StoreError

    try:
        app()
    except (ConfigError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, OSError) as error:
        if type(error).__name__ == "Submitted":
            print(f"submitted: {error}", file=sys.stderr)
            sys.exit(75)  # EX_TEMPFAIL: not an error, but the next stage must wait
        expected = isinstance(error, OSError) or type(error).__module__.startswith("phf.")
        if not expected:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
