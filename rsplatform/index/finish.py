"""From the pipeline's rows to a finished index: the table, the vectors beside it, the vector index, and meta.json."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from lancedb.index import BTree

from rsplatform.index.table import META, IndexMeta, MappedVectors, forget_rows, open_lancedb, open_rows, write_table
from rsplatform.index.vector_index import train_vector_index
from rsplatform.storage import write_json

# Comparing so many vectors of 512 takes 15 to 20 ms on one core; above it lists are trained (our default).
EXACT_BELOW_ROWS = 50_000
TEXT_QUERIES = 256

EmbedTexts = Callable[[Sequence[str]], np.ndarray]


def finish_index(
    artifact_uri: str,
    model_hash: str,
    exact_below_rows: int = EXACT_BELOW_ROWS,
    embed_texts: EmbedTexts | None = None,
) -> IndexMeta:
    """Make the table of the pipeline's rows and write meta.json; killed anywhere, it starts again from those rows.

    From `exact_below_rows` on, lists of near rows are trained, and the recall of visiting some of them is measured with
    the rows' own vectors and, if the model's `embed_texts` is given, with their captions.

    Raises:
        ArtifactError: there are no rows.
    """
    num_rows, width = write_table(artifact_uri)
    open_lancedb(artifact_uri).create_index("id", config=BTree())
    meta = IndexMeta(model_hash, width, num_rows, exact_below_rows)
    if num_rows >= exact_below_rows:
        vectors_NE = MappedVectors(artifact_uri, num_rows, width).vectors_NE
        meta = train_vector_index(artifact_uri, meta, vectors_NE, _embedded_captions(artifact_uri, embed_texts))
    write_json(f"{artifact_uri}/{META}", asdict(meta))
    forget_rows(artifact_uri)
    return meta


def _embedded_captions(artifact_uri: str, embed_texts: EmbedTexts | None) -> np.ndarray | None:
    """Vectors of some captions of the table, spread over it; None without a model or a caption."""
    rows = open_rows(artifact_uri)
    spread = np.unique(np.linspace(0, rows.count_rows() - 1, 4 * TEXT_QUERIES).astype(int)).tolist()
    captions = rows.take(spread, columns=["caption"])["caption"].to_pylist() if embed_texts else []
    different = list(dict.fromkeys(caption for caption in captions if caption))[:TEXT_QUERIES]
    return embed_texts(different) if embed_texts and different else None
