"""Push a scored corpus to the Hugging Face Hub.

    phf push scored/ me/my-corpus-scored

Pushed are the Parquet files, added scores, the manifest and a card. `datasets.load_dataset("me/my-corpus-scored")`
loads them, and `phf tokenize hf://datasets/me/my-corpus-scored tokens/` tokenizes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phf.core import folders, store
from phf.data.scored import ScoredCorpus, bad_above_of


def push_scored(scored: str | Path, repo: str, private: bool = True, token: str | None = None) -> str:
    """Push a finished scored corpus and return its address. Needs a Hub token (`hf auth login`, or HF_TOKEN)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    corpus = ScoredCorpus(scored)
    if not corpus.manifest.parts or not store.is_local(corpus.path):
        raise store.StoreError(f"{scored}: only the output of `phf score` in a local folder can be pushed")
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(corpus.path),
            repo_id=repo,
            repo_type="dataset",
            allow_patterns=["part-*.parquet", "scores/*/part-*.parquet"],
            ignore_patterns=[f"scores/*{folders.OLD}*"],
            delete_patterns=["part-*.parquet", "scores/**"],  # of an earlier push
            commit_message="Scored corpus",
        )
        for file in [folders.MANIFEST, *(f"scores/{name}/{folders.MANIFEST}" for name in _added(corpus))]:
            public_form = store.without_places(store.read_json(corpus.path / file))
            api.upload_file(
                path_or_fileobj=(json.dumps(public_form, indent=2, ensure_ascii=False) + "\n").encode(),
                path_in_repo=file,
                repo_id=repo,
                repo_type="dataset",
                commit_message="Manifest",
            )
        api.upload_file(
            path_or_fileobj=data_card(corpus, repo).encode(),
            path_in_repo="README.md",
            repo_id=repo,
            repo_type="dataset",
            commit_message="Card",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise store.StoreError(f"the Hub refused {repo}: {error}") from None
    return str(url)


def data_card(corpus: ScoredCorpus, title: str) -> str:
    """The dataset card: scorer, sizes, failures, source and columns."""
    manifest = corpus.manifest
    counts = manifest.counts
    identity = manifest.identity
    head = {
        "pretty_name": title.rpartition("/")[2],
        "tags": ["phf", "pretraining-with-human-feedback", "scored-text"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "part-*.parquet"}]}],
    }
    lines = [
        f"# {title}",
        "",
        "Text cut into segments, each with a misalignment score: 0 is fine, larger is worse, null is not judged.",
        f"Scored by `{identity['name']}` ({identity.get('unit', 'score')}) with phf "
        f"{manifest.versions.get('phf', '')}.",
        "",
        "| | |",
        "|---|---:|",
        f"| documents | {counts.documents:,} |",
        f"| segments | {counts.segments:,} |",
        f"| characters | {counts.chars:,} |",
        f"| segments with a score above {bad_above_of(manifest):g} | {counts.bad_segments:,} |",
        f"| segments not judged | {counts.unjudged:,} |",
        f"| skipped rows | {sum(manifest.rejected.values()):,} |",
        "",
        "## Scorer",
        "",
        *_list(store.without_places(identity)),
        "",
        "## Failures",
        "",
        *(_list(manifest.failures) or ["None: every segment was judged."]),
        "",
        "## Skipped rows",
        "",
        *(_list(manifest.rejected) or ["None."]),
        "",
        "## Source",
        "",
        *_list(store.without_places({"corpus": manifest.corpus, "segments": manifest.segmenter})),
        "",
        "## Columns",
        "",
        "`id`; `texts`: the segments, which joined are the document; `scores`: one per segment; `avg_score`: mean of "
        "the judged segments; `num_sents`: number of segments; `meta`: the source's own fields as JSON.",
    ]
    if added := _added(corpus):
        lines += ["", "## Other scores, row by row", ""]
        lines += [f"- `scores/{name}/`: {corpus.added(name).identity.get('unit', 'score')}" for name in added]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def _added(corpus: ScoredCorpus) -> list[str]:
    return [name for name in corpus.preferences() if name != corpus.main]


def _list(values: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: `{store.canonical(value)}`" for key, value in values.items()]
