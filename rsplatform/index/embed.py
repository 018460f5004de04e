"""From pictures to rows of the index: what has no vector yet is embedded, and gets its caption and the model's hash.

In: tables as sources.py reads them. Out: the same rows with `vector` filled; a picture that cannot be read keeps its
row, with a reason to drop it. No Ray: build.py runs it in actors.
Shapes: I images, E embedding.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from rsplatform.artifacts import open_artifact
from rsplatform.curate.pipeline import replace_column
from rsplatform.dataset.store import open_table
from rsplatform.index.sources import OWN_ID
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import ImageError, read_square
from rsplatform.storage import local_folder

MODEL_FOLDER = "model"
CAPTION_TABLE = "captions.lance"


def load_embedder(root: str, model_ref: str, device: str = "cpu") -> Embedder:
    """The model of a finished artifact on `device`, in evaluation mode; from an object store by a temporary folder.

    Raises:
        ArtifactError: the artifact is missing or unfinished.
    """
    with local_folder(open_artifact(root, model_ref).path(MODEL_FOLDER)) as folder:
        embedder = Embedder.load(folder, device)
    embedder.model.eval()
    return embedder


class ChipEmbedder:
    """Table operation: loads the model and the captions once, then embeds one table of rows after the other.

    `captions` names the captions artifact of a chips artifact. All are held in memory (about 100 bytes a chip): a join
    per shard would scan them again each time.
    """

    def __init__(self, root: str, model_ref: str, captions: Mapping[str, str], device: str = "cpu") -> None:
        self.embedder = load_embedder(root, model_ref, device)
        self.captions = {chips: _first_captions(root, ref) for chips, ref in captions.items()}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with vectors, captions, model hash and drops, columns in the same order."""
        if rows["vector"].null_count == 0:
            return rows  # of an earlier index
        squares, good, drops = [], [], [(None, None)] * rows.num_rows
        size, known_m = self.embedder.image_size, rows["ground_sample_distance_m"].to_numpy()
        for index, (image, distance_m) in enumerate(zip(rows["image"].to_pylist(), known_m, strict=True)):
            try:
                # resized at once: a shard of whole decoded pictures would be gigabytes
                squares.append(read_square(image, size, distance_m))
                good.append(index)
            except ImageError as error:
                drops[index] = (error.reason, error.detail)
        vectors_IE = np.zeros((rows.num_rows, self.embedder.embedding_width), dtype=np.float32)
        vectors_IE[good] = self.embedder.embed_images(
            [seen.pixels_HWC for seen in squares], [seen.ground_sample_distance_m for seen in squares]
        )
        for name, column in self._columns(rows, vectors_IE).items():
            rows = replace_column(rows, name, column)
        for name, values in zip(("drop_reason", "drop_detail"), zip(*drops, strict=True), strict=True):
            rows = replace_column(rows, name, pa.array(values, pa.string()))
        return rows

    def _columns(self, rows: pa.Table, vectors_IE: np.ndarray) -> dict[str, pa.Array]:
        flat = pa.array(vectors_IE.astype(np.float16).ravel(), pa.float16())
        return {
            "vector": pa.FixedSizeListArray.from_arrays(flat, self.embedder.embedding_width),
            "model_hash": pa.array([self.embedder.model_hash] * rows.num_rows, pa.string()),
            "caption": pa.array(self._captions(rows), pa.string()),
        }

    def _captions(self, rows: pa.Table) -> list[str]:
        own_ids = zip(rows["table"].to_pylist(), rows[OWN_ID].to_pylist(), strict=True)
        return [self.captions.get(table, {}).get(chip_id, "") for table, chip_id in own_ids]


def _first_captions(root: str, captions_ref: str) -> dict[str, str]:
    table = open_table(root, captions_ref, CAPTION_TABLE).to_table(columns=["id", "captions"])
    pairs = zip(table["id"].to_pylist(), table["captions"].to_pylist(), strict=True)
    return {chip_id: texts[0] for chip_id, texts in pairs if texts}
