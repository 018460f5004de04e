"""The README.md of an exported model: what it is, what it was trained on, how it was measured, where it ends.

In: facts from manifests and reports. Out: Markdown with YAML front matter as the Hugging Face hub reads it. Everything
in it was recorded by the jobs; the licence alone is nobody's to derive: it is left to the person who publishes.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from rsplatform.model.mammut import MammutConfig

INTENDED_USE = (
    "Searching overhead pictures by text or by picture, zero-shot classification, captions, and showing where in a "
    "picture a text is true. For people who can check the answers against the picture."
)
LIMITS = (
    "Three colour bands only. Texts in the languages of the training captions. Its answers are rankings by similarity, "
    "not measurements: not for navigation, targeting, damage assessment or decisions about people without a person's "
    "check.",
    "It repeats what its captions leave out: places and things that the training data show rarely are found rarely.",
)
NO_LICENCE = (
    "Not chosen. Whoever publishes this model chooses one (recipe field `licence`) that its training data, their "
    "attributions above and the weights it started from allow."
)


@dataclass(frozen=True)
class TrainingInput:
    """One artifact that the model was made from, directly or not."""

    ref: str
    counts: dict[str, Any]
    fingerprint: str
    attributions: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkNumber:
    """One number of an evaluation; `chance` None where none is known. `pin` is the hash of all that was fixed."""

    evaluation: str
    benchmark: str
    metric: str
    value: float
    chance: float | None
    pin: str


@dataclass(frozen=True)
class CardFacts:
    """All that a card says."""

    title: str
    ref: str
    model_hash: str
    config: MammutConfig
    num_parameters: int
    manifest: dict[str, Any]
    inputs: list[TrainingInput]
    numbers: list[BenchmarkNumber]
    licence: str | None
    intended_use: str
    has_openmammut: bool


def model_card(facts: CardFacts) -> str:
    """The card's text."""
    sections = {
        "What it is": _architecture(facts),
        "What it was trained on": _training(facts),
        "Evaluation": _evaluation(facts.numbers),
        "Intended use": facts.intended_use,
        "Limits": "\n".join(f"- {limit}" for limit in LIMITS),
        "Licence": facts.licence or NO_LICENCE,
        "Use": _use(facts),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {facts.title}\n\n{body}\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": facts.licence or "unknown",
        "library_name": "rsplatform",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["remote-sensing", "image-text-retrieval", "image-captioning", "mammut", "safetensors"],
    }
    results = [
        {
            "task": {"type": "zero-shot-evaluation"},
            "dataset": {"name": number.benchmark, "type": number.benchmark, "revision": number.pin},
            "metrics": [{"type": number.metric, "value": round(number.value, 4)}],
        }
        for number in facts.numbers
    ]
    return front | ({"model-index": [{"name": facts.title, "results": results}]} if results else {})


def _architecture(facts: CardFacts) -> str:
    vision, text = facts.config.vision, facts.config.text
    rows = {
        "parameters": f"{facts.num_parameters:,}",
        "image tower": f"{vision.num_layers} layers of width {vision.width}, patches of {vision.patch_size} px, "
        f"pictures of {vision.image_size} px, pooling {vision.pooling}",
        "text decoder": f"{text.num_layers} layers of width {text.width}, context {text.context_length}, "
        f"vocabulary {text.vocab_size}, pooling {text.pooling}",
        "embedding": f"{facts.config.embedding_width} numbers, unit length",
        "artifact": f"`{facts.ref}`",
        "model hash": f"`{facts.model_hash}`",
    }
    opening = "A MaMMUT (arXiv 2303.16839): one image tower, and one text decoder that both embeds and captions."
    return f"{opening}\n\n" + _table(["", ""], [list(row) for row in rows.items()])


def _training(facts: CardFacts) -> str:
    counts = facts.manifest["counts"]
    lines = [f"No training is recorded in `{facts.ref}` itself."]
    if "samples_seen" in counts:
        lines = [f"{counts['samples_seen']:,} samples seen in {counts['steps']:,} steps."]
        if counts.get("exported_step", counts["steps"]) != counts["steps"]:  # older manifests do not tell it
            lines = [f"{lines[0]} These weights are those of step {counts['exported_step']:,}, the best in validation."]
    metrics = {name: value for name, value in facts.manifest["metrics"].items() if name.startswith("final/")}
    decay = facts.manifest["config"].get("ema_decay")
    if metrics:
        numbers = ", ".join(f"{name[6:]} {value:.4g}" for name, value in sorted(metrics.items()))
        whose = " (of the weights in training, whose moving average this is)" if decay is not None else ""
        lines.append(f"At the end{whose}: {numbers}")
    rows = [[f"`{item.ref}`", _counted(item.counts), f"`{item.fingerprint[:12]}`"] for item in facts.inputs]
    if rows:
        lines.append(_table(["made from", "holds", "manifest sha256"], rows))
    attributions = sorted({text for item in facts.inputs for text in item.attributions})
    if attributions:
        lines.append("Attributions of the imagery and maps: " + "; ".join(attributions))
    lines.append(f"Code: commit `{facts.manifest['git_sha']}`, finished {facts.manifest['finished']}.")
    return "\n\n".join(lines)


def _counted(counts: dict[str, Any]) -> str:
    numbers = {key: value for key, value in counts.items() if isinstance(value, int | float)}
    return ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in numbers.items())


def _evaluation(numbers: list[BenchmarkNumber]) -> str:
    if not numbers:
        return "None is attached (recipe field `evaluations`)."
    rows = [
        [
            number.benchmark,
            number.metric,
            f"{number.value:.2f}",
            "" if number.chance is None else f"{number.chance:.2f}",
            f"`{number.pin[:16]}`",
            f"`{number.evaluation}`",
        ]
        for number in numbers
    ]
    opening = "In percent. Numbers compare only under the same pin: the hash of split, prompts, classes and pictures."
    return f"{opening}\n\n" + _table(["benchmark", "metric", "value", "chance", "pin", "from"], rows)


def _use(facts: CardFacts) -> str:
    code = (
        '```python\nfrom rsplatform.model.embedder import Embedder\n\nembedder = Embedder.load("path/of/this/folder")\n'
        'similarity_IT = embedder.embed_images(images) @ embedder.embed_texts(["an aerial image of a harbour"]).T\n```'
    )
    layout = "\n\n`../openmammut/` holds the same weights in openMaMMUT's layout." if facts.has_openmammut else ""
    return code + layout


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
