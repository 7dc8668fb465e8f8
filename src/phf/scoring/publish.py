"""Scored corpora on the Hugging Face Hub. Floor 2.

    phf push scored/ me/my-corpus-scored

What is pushed loads with `datasets.load_dataset("me/my-corpus-scored")` and goes on with
`phf tokenize hf://datasets/me/my-corpus-scored tokens/`: Parquet files with the columns of the published scored data
sets, the manifest, scores that were added, and a card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from phf.core import store
from phf.data.scored import ScoredCorpus


def push_scored(scored: str | Path, repo: str, private: bool = True, token: str | None = None) -> str:
    """Push a finished scored corpus and return its address. Needs a token of the Hub (`hf auth login`, or HF_TOKEN)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    corpus = ScoredCorpus(scored)
    if corpus.manifest.get("parts") is None or not store.is_local(corpus.path):
        raise store.StoreError(f"{scored}: only what `phf score` wrote into a folder of this machine can be pushed")
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(corpus.path),
            repo_id=repo,
            repo_type="dataset",
            allow_patterns=["part-*.parquet", store.MANIFEST, "scores/*/part-*.parquet", f"scores/*/{store.MANIFEST}"],
            delete_patterns=["part-*.parquet", "scores/**"],  # of an earlier push
            commit_message="Scored corpus",
        )
        api.upload_file(
            path_or_fileobj=data_card(corpus, repo).encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset",
            commit_message="Card",
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError) as error:
        raise store.StoreError(f"the Hub refused {repo}: {error}") from None
    return str(url)


def data_card(corpus: ScoredCorpus, title: str) -> str:
    """The card: what scored the corpus, how much there is, what failed, and the columns."""
    manifest = corpus.manifest
    counts, identity = manifest["counts"], manifest["identity"]
    head = {
        "pretty_name": title.rpartition("/")[2],
        "tags": ["phf", "pretraining-with-human-feedback", "scored-text"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "part-*.parquet"}]}],
    }
    lines = [
        f"# {title}",
        "",
        "Text cut into segments, each with a misalignment score: 0 is fine, larger is worse, null could not be judged.",
        f"Scored by `{identity['name']}` ({identity.get('unit', 'score')}) with [phf](https://pypi.org/project/phf/) "
        f"{manifest['versions'].get('phf', '')}.",
        "",
        "| | |",
        "|---|---:|",
        f"| documents | {counts['documents']:,} |",
        f"| segments | {counts['segments']:,} |",
        f"| characters | {counts['chars']:,} |",
        f"| segments that score above 0 | {counts['bad_segments']:,} |",
        f"| segments not judged | {counts['unjudged']:,} |",
        f"| rows set aside | {sum(manifest['rejected'].values()):,} |",
        "",
        "## Scorer",
        "",
        *_list(identity),
        "",
        "## Failures",
        "",
        *(_list(manifest["failures"]) or ["None: every segment was judged."]),
        "",
        "## Rows set aside",
        "",
        *(_list(manifest["rejected"]) or ["None."]),
        "",
        "## Source",
        "",
        *_list({"corpus": manifest["corpus"], "segments": manifest["segmenter"]}),
        "",
        "## Columns",
        "",
        "`id`; `texts`, the segments (joined they are the document); `scores`, one for each; `avg_score`, their mean over "
        "the judged ones; `num_sents`, how many; `meta`, the source's own fields as JSON.",
    ]
    added = [name for name in corpus.preferences() if name != corpus.main]
    if added:
        lines += ["", "## Other scores, row by row", ""]
        lines += [f"- `scores/{name}/`: {corpus.added(name)['identity'].get('unit', 'score')}" for name in added]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def _list(values: dict[str, Any]) -> list[str]:
    return [f"- {key}: `{store.canonical(value)}`" for key, value in values.items()]
