"""From chips to rows of the index: pictures embedded, bounds and dates as typed columns, the caption beside them.

In: tables of CHIP_SCHEMA rows with their row numbers. Out: the same rows with the columns of `index_schema`; a
picture that cannot be read keeps its row, with a reason to drop it. No Ray: build.py runs it in actors.
Shapes: I images, E embedding.
"""

import numpy as np
import pyarrow as pa

from rsplatform.artifacts import open_artifact
from rsplatform.dataset.store import open_table
from rsplatform.index.store import index_schema
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import ImageError, read_square
from rsplatform.records import parse_time
from rsplatform.storage import local_folder

MODEL_FOLDER = "model"
CAPTION_TABLE = "captions.lance"
CHIP_COLUMNS = [
    *("id", "image", "scene", "split", "row_px", "column_px", "height_px", "width_px"),
    *("bounds_lonlat", "ground_sample_distance_m", "datetime", "landmarks"),
]


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
    """Table operation: loads the model and the captions once, then embeds one table of chips after the other.

    All captions are held in memory (about 100 bytes a chip): a join per shard would scan them again each time.
    """

    def __init__(self, root: str, model_ref: str, captions_ref: str | None, device: str = "cpu") -> None:
        self.embedder = load_embedder(root, model_ref, device)
        self.captions: dict[str, str] = {}
        if captions_ref:
            table = open_table(root, captions_ref, CAPTION_TABLE).to_table(columns=["id", "captions"])
            pairs = zip(table["id"].to_pylist(), table["captions"].to_pylist(), strict=True)
            self.captions = {chip_id: texts[0] for chip_id, texts in pairs if texts}

    def __call__(self, chips: pa.Table) -> pa.Table:
        """The rows of `chips` with the columns of the index, in their order."""
        squares, good, drops = [], [], [(None, None)] * chips.num_rows
        size, known_m = self.embedder.image_size, chips["ground_sample_distance_m"].to_numpy()
        for index, (image, distance_m) in enumerate(zip(chips["image"].to_pylist(), known_m, strict=True)):
            try:
                # resized at once: a shard of whole decoded pictures would be gigabytes
                squares.append(read_square(image, size, distance_m))
                good.append(index)
            except ImageError as error:
                drops[index] = (error.reason, error.detail)
        vectors_IE = np.zeros((chips.num_rows, self.embedder.embedding_width), dtype=np.float32)
        vectors_IE[good] = self.embedder.embed_images(
            [seen.pixels_HWC for seen in squares], [seen.ground_sample_distance_m for seen in squares]
        )
        reasons = [earlier or drop[0] for earlier, drop in zip(chips["drop_reason"].to_pylist(), drops, strict=True)]
        details = [earlier or drop[1] for earlier, drop in zip(chips["drop_detail"].to_pylist(), drops, strict=True)]
        columns = self._columns(chips, vectors_IE)
        columns |= {"drop_reason": pa.array(reasons, pa.string()), "drop_detail": pa.array(details, pa.string())}
        for name, column in columns.items():
            place = chips.schema.get_field_index(name)
            chips = chips.append_column(name, column) if place < 0 else chips.set_column(place, name, column)
        return chips

    def _columns(self, chips: pa.Table, vectors_IE: np.ndarray) -> dict[str, pa.Array]:
        schema = index_schema(self.embedder.embedding_width)
        bounds = np.array(chips["bounds_lonlat"].to_pylist(), dtype=np.float64).reshape(-1, 4)
        times = [parse_time(text) if text else None for text in chips["datetime"].to_pylist()]
        kinds = [sorted({item["kind"] for item in items or []}) for items in chips["landmarks"].to_pylist()]
        captions = [self.captions.get(chip_id, "") for chip_id in chips["id"].to_pylist()]
        flat = pa.array(vectors_IE.astype(np.float16).ravel(), pa.float16())
        return {
            "vector": pa.FixedSizeListArray.from_arrays(flat, self.embedder.embedding_width),
            "datetime": pa.array(times, schema.field("datetime").type),
            "kinds": pa.array(kinds, schema.field("kinds").type),
            "caption": pa.array(captions, pa.string()),
            **{name: pa.array(bounds[:, i]) for i, name in enumerate(("west", "south", "east", "north"))},
        }
