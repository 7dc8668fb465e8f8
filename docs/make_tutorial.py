"""Write docs/tutorial.ipynb, run from top to bottom: python docs/make_tutorial.py (two minutes)."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELLS = [
    """\
# Tutorial: from text to a model that keeps personal data to itself

Five steps on text that every installation has: the README texts of the installed Python packages. Each takes seconds to
a minute on two cores. `make demo` does the same with a larger budget and more objectives.""",
    """\
import phf

TOKENS = 4e5  # of training; raise it for better models""",
    """\
## 1. Score the text

Every line gets a score: personal data (links, @handles, mail addresses, numbers) per character. Larger is worse. The
folder gets Parquet files and a manifest with what was counted and skipped.""",
    """\
scored = phf.score("installed_packages", "scored", scorer="pii", segmenter="lines")
counts = scored.counts
bad = counts.bad_segments / counts.segments
print(f"{counts.documents} documents, {counts.segments:,} lines, {bad:.1%} of them bad")""",
    """\
Look before you train: what does a threshold call bad? `phf inspect scored/` writes this as a page.""",
    """\
found = phf.inspect_scores("scored")
print(f"suggested threshold for conditional training: {found.suggested.conditional:g}")
for row in found.worst_segments[:3]:
    print(f"{row.score:.3f}  {len(row.text)} characters of {row.id}")""",
    """\
## 2. Tokenize, once for all objectives""",
    """\
tokens = phf.tokenize("scored", "tokens", vocab_size=2048, heldout=0.1)
print(f"{tokens.counts.train_tokens:,} tokens for training, vocabulary {tokens.vocab_size:,}")""",
    """\
## 3. Train two models on the same text

`mle` is ordinary training. `conditional` puts a good or a bad token before every line, and writes after the good
one.""",
    """\
settings = {"tokens": TOKENS, "context": 256, "batch_rows": 8, "optimizer": "muon", "lr": 1.6e-2, "muon_lr": 8e-3}
for name in ("mle", "conditional"):
    run = phf.train("tokens", f"runs/{name}", model="tiny", objective=name, **settings)
    print(f"{name}: {run.parameters:,} parameters, {run.counts.tokens:,} tokens")""",
    """\
The loss during training, from the run's `metrics.jsonl`:""",
    """\
import json

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3))
for name in ("mle", "conditional"):
    lines = [json.loads(line) for line in open(f"runs/{name}/metrics.jsonl")]
    axes.plot([line["tokens"] for line in lines], [line["loss"] for line in lines], label=name)
axes.set_xlabel("tokens")
axes.set_ylabel("training loss")
legend = axes.legend()""",
    """\
## 4. Judge their texts

The scorer of the corpus judges samples of both models. Held-out loss, on good and on bad text, says what each still
knows.""",
    """\
for name in ("mle", "conditional"):
    result = phf.evaluate(f"runs/{name}", num_samples=128, max_tokens=96)
    judged = result.scenarios["unconditional"].misalignment
    low, high = judged.ci95
    loss = result.heldout.main
    print(
        f"{name}: {1000 * judged.mean:.1f} per 1,000 characters ({1000 * low:.1f} to {1000 * high:.1f}); "
        f"loss on good text {loss.good.nats_per_byte:.2f}, on bad text {loss.bad.nats_per_byte:.2f}"
    )""",
    """\
With so few tokens, the models write badly, and the seed matters: a claim needs several seeds and a larger budget (`phf
run grid`). One page compares the runs, with all samples side by side:""",
    """\
print(phf.report("runs"))""",
    """\
## 5. Release

A folder that plain transformers loads. The good token and the ban on the bad one come with it.""",
    """\
from transformers import pipeline

release = phf.export("runs/conditional", "release")
write = pipeline("text-generation", model=str(release))
print(write("The package", max_new_tokens=20)[0]["generated_text"])""",
    """\
What next: [your own preference](preference.md), [concepts](concepts.md), [recipes](recipes.md), and [which objective to
choose](findings.md).""",
]


def notebook() -> nbformat.NotebookNode:
    """The notebook, not yet run."""
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, text in enumerate(CELLS):
        is_code = "\n" in text.strip() and not text.startswith("#") and not re.match(r"[A-Z]", text)
        is_code |= text.startswith(("print", "import", "from"))
        make = nbformat.v4.new_code_cell if is_code else nbformat.v4.new_markdown_cell
        made.cells.append(make(text, id=f"cell-{number}"))
    return made


def run(made: nbformat.NotebookNode, folder: str | Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder."""
    NotebookClient(made, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in made.cells:
        if cell.cell_type == "code":  # what differs from run to run, and what only says how far it is
            cell.metadata.pop("execution", None)
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get("data", {}) else None
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run(notebook(), folder), HERE / "tutorial.ipynb")
