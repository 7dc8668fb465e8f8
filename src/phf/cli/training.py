"""Commands that make models: training and releasing."""

from __future__ import annotations

from typing import Annotated

import typer

from phf.cli.shared import Settings, split_settings


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
    from phf.core.config import load
    from phf.evaluation.monitor import JudgeDuring
    from phf.recipes.recipe import TrainStage
    from phf.training.train import train as train_run

    files, overrides = split_settings(settings)
    stage = load(files, overrides, TrainStage)
    during = (JudgeDuring(stage.during, out, tokens, stage.train, stage.objective),) if stage.during else ()
    manifest = train_run(tokens, out, stage.model, stage.objective, stage.train, stage.seed, callbacks=during)
    if manifest:
        counts = manifest["counts"]
        print(
            f"{counts['tokens']:,} tokens in {counts['steps']:,} steps ({counts['epochs']:.2f} epochs), {manifest['seconds']:.0f} s; model in {out}/model"
        )


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
