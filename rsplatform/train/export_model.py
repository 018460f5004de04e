"""Front door `export_model`: a model artifact in, a folder for others out: weights, config, tokenizer and model card.

`model/` is what `Embedder.load` and `start_from` read, and what a model hub shows; `openmammut/` the same weights in
that layout, if asked for. Bit-equal copies: nothing is rounded or renamed in `model/`. Uploads nothing.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact, verify
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, InputArtifact, ModelArtifact, StageConfig, of_kind
from rsplatform.model.embedder import Embedder
from rsplatform.model.openmammut_export import layout_config, save_openmammut
from rsplatform.model.weights import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, load_model
from rsplatform.stage import finished, open_stage
from rsplatform.train.model_card import INTENDED_USE, BenchmarkNumber, CardFacts, TrainingInput, model_card

CARD_FILE = "README.md"
SCENES_FILE = "scenes.json"


class ExportModelConfig(StageConfig):
    """`evaluations` are evaluation artifacts of this very model, whose numbers the card shows.

    `licence`: an identifier such as apache-2.0; left out, the card says that none is chosen.
    """

    model: ModelArtifact
    evaluations: list[Annotated[InputArtifact, of_kind("evaluation")]] = []
    openmammut: bool = False
    title: str | None = None
    licence: str | None = None
    intended_use: str = INTENDED_USE


def export_model(config: ExportModelConfig, cluster: Cluster) -> Artifact:
    """Write a model as a folder for others: weights, config, tokenizer and model card.

    Raises:
        ArtifactError: a file of the model differs from its manifest: what is damaged must not be given to others.
        ConfigError: an evaluation of another model.
        WeightsError: `openmammut` of a model that its layout cannot hold.
    """
    done = finished(config, cluster)
    if done:
        return done
    source = open_artifact(cluster.root, config.model)
    verify(source)
    with open_stage(config, cluster) as stage:
        with storage.local_folder(source.path("model")) as folder:
            embedder = Embedder.load(folder)
        for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
            storage.write_bytes(stage.artifact.path(f"model/{name}"), storage.read_bytes(source.path(f"model/{name}")))
        if config.openmammut:
            _write_openmammut(source, stage.artifact)
        facts = _facts(config, cluster, embedder)
        card = model_card(facts)
        storage.write_bytes(stage.artifact.path(f"model/{CARD_FILE}"), card.encode())
        stage.run.log_text(card, CARD_FILE)
        stage.run.set_tags({"model_hash": facts.model_hash})
        stage.counts = {"inputs": 1, "kept": 1, "dropped": {}}
    return stage.artifact


def _write_openmammut(source: Artifact, artifact: Artifact) -> None:
    with storage.local_folder(source.path("model")) as own:
        model, tokenizer = load_model(own)  # in the dtype of its file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_openmammut(folder / WEIGHTS_FILE, model)
        layout = layout_config(model.config)
        (folder / CONFIG_FILE).write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(folder / TOKENIZER_FILE)
        storage.upload_folder(folder, artifact.path("openmammut"))


def _facts(config: ExportModelConfig, cluster: Cluster, embedder: Embedder) -> CardFacts:
    return CardFacts(
        title=config.title or config.model,
        ref=config.model,
        model_hash=embedder.model_hash,
        config=embedder.model.config,
        num_parameters=sum(parameter.numel() for parameter in embedder.model.parameters()),
        manifest=open_artifact(cluster.root, config.model).manifest(),
        inputs=_lineage(cluster.root, config.model),
        numbers=[number for ref in config.evaluations for number in _numbers(cluster.root, ref, embedder.model_hash)],
        licence=config.licence,
        intended_use=config.intended_use,
        has_openmammut=config.openmammut,
    )


def _lineage(root: str, ref: str) -> list[TrainingInput]:
    """Everything that the model was made from, nearest first, as long as its manifests still stand."""
    found: dict[str, TrainingInput] = {}
    waiting = list(Artifact(root, ref).manifest()["inputs"].items())
    while waiting:
        name, fingerprint = waiting.pop(0)
        if name in found:
            continue
        artifact = Artifact(root, name)
        manifest: dict[str, Any] = artifact.manifest() if artifact.is_finished else {"counts": {}, "inputs": {}}
        found[name] = TrainingInput(name, manifest["counts"], fingerprint, _attributions(artifact))
        waiting += manifest["inputs"].items()
    return list(found.values())


def _attributions(artifact: Artifact) -> tuple[str, ...]:
    """Whose imagery chips were cut from, and whose maps say what they show."""
    if not storage.exists(artifact.path(SCENES_FILE)):
        return ()
    scenes = artifact.read_json(SCENES_FILE)
    credits = {text for scene in scenes for text in (scene["attribution"], *scene.get("landmark_attributions", []))}
    return tuple(sorted(credits - {""}))


def _numbers(root: str, ref: str, model_hash: str) -> list[BenchmarkNumber]:
    report = open_artifact(root, ref).read_json("report.json")
    if report["model_hash"] != model_hash:
        raise ConfigError(f"evaluations: {ref} measured {report['model']}, which is another model; evaluate this one")
    numbers = []
    for name, result in report["benchmarks"].items():
        for metric, value in result.items():
            is_number = isinstance(value, int | float) and not metric.startswith(("num_", "chance_"))
            if is_number:
                chance = result.get(f"chance_{metric}")
                numbers.append(BenchmarkNumber(ref, name, metric, float(value), chance, result["pin"]))
    return numbers
