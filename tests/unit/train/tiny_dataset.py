"""A small finished dataset artifact over a web_pairs and a chips artifact, as the stages before training leave them."""

from collections.abc import Sequence

import lance
import pyarrow as pa

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact
from rsplatform.records import SAMPLE_SCHEMA
from tests.unit.train.tiny_training import TinyStore


def make_tiny_dataset(
    root: str, num_samples: int = 24, num_validation: int = 8, sources: Sequence[str] = ("web_pairs", "chips")
) -> None:
    """web_pairs/tiny/v1 and chips/tiny/v1 with half of the samples each, and dataset/tiny/v1 over both, in whose eyes
    the samples come from `sources` in turn."""
    store = TinyStore(num_samples + num_validation)
    rows = []
    for kind in ("web_pairs", "chips"):
        members = [i for i in range(len(store)) if (i % 2 == 0) == (kind == "web_pairs")]
        images = [sample.image for sample in store.read(members)]
        write(
            root, f"{kind}/tiny/v1", f"{kind}.lance", pa.table({"id": [store.ids[i] for i in members], "image": images})
        )
        rows += [
            {
                "id": store.ids[index],
                "table": f"{kind}/tiny/v1",
                "row": row,
                "source": sources[index % len(sources)],
                "captions": store.captions(index),
                "caption_weights": [1.0, 1.0],
                "split": "train" if index < num_samples else "val",
                "weight": 1.0,
                "ground_sample_distance_m": store.distance_m(index),
            }
            for row, index in enumerate(members)
        ]
    write(root, "dataset/tiny/v1", "samples.lance", pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))


def write(root: str, ref: str, table_name: str, table: pa.Table) -> None:
    artifact = Artifact(root, ref)
    recipe = artifacts.identity({"output": ref}, {})
    artifacts.begin(artifact, recipe)
    uri = artifact.path(table_name)
    lance.write_dataset(table, uri, storage_options=storage.lance_options(uri))
    artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")


def tiny_recipe(**changes) -> dict:
    """A recipe that trains a very small model on that dataset in about a second."""
    sizes = {"vision_width": 32, "text_width": 32, "vision_num_layers": 1, "text_num_layers": 2, "image_size": 16}
    sizes |= {"vision_mlp_width": 64, "text_mlp_width": 64, "patch_size": 4, "vocab_size": 320, "context_length": 16}
    schedule = {"learning_rate": 1e-3, "warmup_steps": 2}
    recipe = {
        "output": "model/tiny/v1",
        "dataset": "dataset/tiny/v1",
        "validation_split": "val",
        "model": {"size": "mini", "settings": sizes},
        "batch_size": 8,
        "phases": [
            {"name": "web", "steps": 3, "schedule": schedule, "mixture": {"web_pairs": 1.0}},
            {"name": "mix", "steps": 5, "schedule": schedule, "mixture": {"web_pairs": 0.25, "chips": 0.75}},
        ],
        "checkpoint_every_steps": 2,
        "report_every_steps": 2,
        "cache_gb": 0.01,
    }
    return recipe | changes
