"""Commands that make models: training and releasing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from phf.cli.shared import Settings, split_settings


def train(
    tokens: Annotated[str, typer.Argument(help="The output of `phf tokenize`.")],
    out: Annotated[str, typer.Argument(help="Folder of the run.")],
    settings: Settings = None,
) -> None:
    """Train a model with an objective. Run the same command again to resume.

    Settings are objective (objective.name=conditional objective.threshold=0 ...), model (model=tiny, small or gpt2;
    model.name=from_config with model.config.model_type=llama model.config.hidden_size=256 ...; or
    model.name=from_weights model.path=...), train (train.tokens=1e7 train.lr=1e-3 ...), monitor (monitor.every=1e6
    measures held-out loss during training) and seed. Recipe files may hold them too. The command also works under
    torchrun and accelerate launch.
    """
    from phf.core.config import load
    from phf.core.runs import RunFolder
    from phf.evaluation.monitor import MonitorCallback
    from phf.evaluation.reference import prepare_reference
    from phf.recipes.recipe import TrainStage
    from phf.training.train import train as train_run

    files, overrides = split_settings(settings)
    stage = load(files, overrides, TrainStage)
    if stage.objective.reference_model is not None and "WORLD_SIZE" not in os.environ:
        prepare_reference(tokens, stage.objective.reference_model, out)
    callbacks: tuple[MonitorCallback, ...] = ()
    if stage.monitor is not None:
        callbacks = (MonitorCallback(stage.monitor, out, tokens, stage.train, stage.objective, stage.scorer),)
    manifest = train_run(
        tokens_dir=tokens,
        out=out,
        model=stage.model,
        objective=stage.objective,
        config=stage.train,
        seed=stage.seed,
        callbacks=callbacks,
    )
    if manifest is not None:
        counts = manifest.counts
        print(
            f"{counts.tokens:,} tokens in {counts.steps:,} steps ({counts.epochs:.2f} epochs), "
            f"{manifest.seconds:.0f} s; model in {RunFolder(Path(out)).model}"
        )


def reference(
    tokens: Annotated[str, typer.Argument(help="The output of `phf tokenize`.")],
    model: Annotated[str, typer.Argument(help="Folder of the reference model, or of a finished run.")],
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a row, at most (default: 1024).")] = None,
) -> None:
    """Compute a model's log-probabilities of a token store.

    For objectives that compare with a reference model (objective.name=anchored objective.reference=MODEL). On one
    process `phf train` does this by itself; before torchrun, run this command. Run it again to resume.
    """
    from phf.evaluation.reference import write_reference

    print(f"log-probabilities: {Path(tokens) / write_reference(tokens, model, context)}")


COLOURS = {"control": "cyan", "end": "blue", "bad": "red", "good": None, "unjudged": "yellow"}


def rows(
    tokens: Annotated[str, typer.Argument(help="The output of `phf tokenize`.")],
    settings: Settings = None,
    number: Annotated[int, typer.Option("--rows", min=1, help="Number of rows.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Place of the first row in the training order.")] = 0,
) -> None:
    """Show rows as the model reads them in training.

    Control tokens, end-of-text, bad and unjudged text have a colour each, and what the objective does not learn is
    underlined. Without a terminal every kind is a line of its own.

    Settings are those of `phf train`: the objective, train.context, train.token_scores, train.scorer_noise and seed.
    """
    from phf.core.config import load
    from phf.core.text import visible
    from phf.recipes.recipe import TrainStage
    from phf.tokens.tokenizer import add_control_tokens
    from phf.training.order import open_tokens, training_order
    from phf.training.show import pieces_of

    files, overrides = split_settings(settings)
    stage = load(files, ["model=tiny", "train.tokens=1e6", "train.context=256", *overrides], TrainStage)
    store = open_tokens(tokens, stage.objective, stage.train, stage.seed)
    objective = stage.objective.fit(store.statistics)
    tokenizer = store.tokenizer
    add_control_tokens(tokenizer, list(objective.control_tokens))
    order = training_order(store, objective, tokenizer, stage.train.context, stage.seed)
    coloured = sys.stdout.isatty()
    for n, row in enumerate(pieces_of(order.batch(start, start + number), store, objective, tokenizer), start):
        print(f"row {n}: {sum(p.tokens for p in row)} targets, {sum(p.tokens for p in row if p.learned)} learned")
        for piece in row:
            text = visible(piece.text)
            if coloured:
                typer.secho(text, fg=COLOURS[piece.kind], underline=not piece.learned, nl=False)
            else:
                print(f"  {piece.kind}{'' if piece.learned else ', not learned'}: {text!r}")
        print()


def export_tokens(
    tokens: Annotated[str, typer.Argument(help="The output of `phf tokenize`.")],
    out: Annotated[str, typer.Argument(help="Folder for the exported tokens.")],
    settings: Settings = None,
    format: Annotated[
        str, typer.Option("--format", help="flat, megatron, neox, olmo or datatrove (docs/engines.md).")
    ] = "flat",
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    scores: Annotated[str | None, typer.Option(help="The preference, where the store holds several.")] = None,
    token_scores: Annotated[bool, typer.Option("--token-scores", help="Scores of tokens instead of segments.")] = False,
    shard_tokens: Annotated[float, typer.Option(min=1, help="Tokens in a shard, about.")] = 1e8,
) -> None:
    """Write what an objective trains on for another engine.

    Each token comes with its score, whether it is learned, and its weight in the loss.

    Settings are the objective (objective=conditional objective.threshold=0 ...) and seed. Run the same command again to
    resume.
    """
    from typing import get_args

    from phf.core.config import ConfigError, did_you_mean, load
    from phf.engines.export import export_tokens as write
    from phf.engines.formats import Format
    from phf.recipes.recipe import TrainStage

    for value, known in ((format, get_args(Format)), (split, ("train", "heldout"))):
        if value not in known:
            raise ConfigError(f"unknown value {value!r}{did_you_mean(value, known)}")
    files, overrides = split_settings(settings)
    stage = load(files, ["model=tiny", "train.tokens=1e6", *overrides], TrainStage)
    kind: Any = format
    manifest = write(tokens, out, stage.objective, kind, split, scores, token_scores, int(shard_tokens), stage.seed)
    print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.learned:,} learned, {manifest.bad:,} "
        f"bad) in {manifest.shards:,} shards of {manifest.format}: {out}"
    )


def export(
    run: Annotated[
        str, typer.Argument(help="A trained run. Judge it with `phf eval` first, so that the card has numbers.")
    ],
    out: Annotated[str, typer.Argument(help="Folder for the release.")],
    push: Annotated[str | None, typer.Option(help="Also push it to this model on the Hub: owner/name.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new model public. Without this option it is private.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="The model's name on its card. Default: --push, or the run's name.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence, as the Hub names it, for example mit.")] = None,
) -> None:
    """Write a model for plain transformers.

    `pipeline("text-generation", model=OUT)` loads it.

    Its tokenizer starts texts with the good token and reads typed control tokens as text. The model never writes the
    bad token. A card says what was measured. The result is loaded and tested before it is marked as finished.
    """
    from phf.release import export as write_release
    from phf.release import push_release

    folder = write_release(run, out, name or push, licence)
    print(f"release: {folder}")
    if push is not None:
        print(f"pushed: {push_release(folder, push, private=not public)}")
