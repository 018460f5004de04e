"""Front door `build_index`: chips, pictures, an earlier index and a model in, a searchable LanceDB table out.

Embedding runs in an actor pool on Ray Data, shard by shard; pictures stay where they are, rows point to them. An index
is changed by making its next version of it: rows that stay are copied with their vectors, only new ones are embedded,
and the new table is compact. A server goes on with the old version until it is deployed again with the new one.
"""

from collections.abc import Iterator

from pydantic import Field, model_validator

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import CaptionsArtifact, ChipsArtifact, ConfigError, IndexArtifact, ModelArtifact, StageConfig
from rsplatform.curate.pipeline import Loaded, Pipeline, Shard, run_pipeline
from rsplatform.dataset.store import open_table
from rsplatform.index.check import check_base, check_ids
from rsplatform.index.embed import ChipEmbedder, load_embedder
from rsplatform.index.finish import EXACT_BELOW_ROWS, finish_index
from rsplatform.index.sources import BASE_ROWS_PER_SHARD, ChipSource, FolderSource, ReadRows, base_rows
from rsplatform.index.table import ROWS_PATH, IndexMeta, index_schema
from rsplatform.model.embedder import granted_device
from rsplatform.sources.listings import only_pictures
from rsplatform.stage import finished, open_stage

STAGE = "build_index"


class BuildIndexConfig(StageConfig):
    """What is indexed with which model.

    `chips` is one artifact (with its `captions`, which only add text to the results) or a list of sources, as for
    chips of several sizes. `base` is an earlier index of the same model, whose rows are taken over but for
    `remove_scenes` (globs over scene names). `rows_per_shard` is the unit of resuming; from `exact_below_rows` rows
    on, searches visit the lists of rows near the query (vector_index.py); below, they compare every row.
    """

    model: ModelArtifact
    chips: ChipsArtifact | list[ChipSource] = Field(default_factory=list)
    captions: CaptionsArtifact | None = None
    folders: list[FolderSource] = Field(default_factory=list)
    base: IndexArtifact | None = None
    remove_scenes: list[str] = Field(default_factory=list)
    rows_per_shard: int = Field(default=512, ge=1)
    exact_below_rows: int = Field(default=EXACT_BELOW_ROWS, ge=256)

    @model_validator(mode="after")
    def _something_is_indexed(self) -> "BuildIndexConfig":
        if not self.chips and not self.folders and not self.base:
            raise ValueError("nothing to index; give chips, folders or a base")
        if self.captions and not isinstance(self.chips, str):
            raise ValueError("captions belongs to a single chips artifact; name it in the list of chips")
        if self.remove_scenes and not self.base:
            raise ValueError("remove_scenes takes scenes from a base; give one")
        return self

    @property
    def chip_sources(self) -> list[ChipSource]:
        """The chips as sources, also where the recipe names a single artifact."""
        if isinstance(self.chips, str):
            return [ChipSource(chips=self.chips, captions=self.captions)]
        return self.chips


def build_index(config: BuildIndexConfig, cluster: Cluster) -> Artifact:
    """Embed pictures with a model and make them searchable by content, place, date, scale and kind."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        device = granted_device(cluster.data.gpus_per_actor)
        embedder = load_embedder(cluster.root, config.model)
        check_base(config.base, config.remove_scenes, cluster.root, embedder.model_hash)
        pipeline, shards = index_pipeline(config, cluster, stage.artifact, device)
        check_ids(shards, cluster.root)
        stage.counts = run_pipeline(pipeline, shards, cluster)
        meta = finish_index(
            stage.artifact.uri, embedder.model_hash, config.exact_below_rows, embed_texts=embedder.embed_texts
        )
        stage.log(_metrics(meta))
    return stage.artifact


def index_pipeline(
    config: BuildIndexConfig, cluster: Cluster, artifact: Artifact, device: str = "cpu"
) -> tuple[Pipeline, list[Shard]]:
    """The pipeline that fills the rows, embedding on `device`, and its shards: ranges of the rows of each source."""
    root = cluster.root
    width = load_embedder(root, config.model).embedding_width
    captions = {source.chips: source.captions for source in config.chip_sources if source.captions}
    pipeline = Pipeline(
        stage=STAGE,
        artifact=artifact,
        table=ROWS_PATH,
        schema=index_schema(width),
        read=ReadRows(root, width),
        operations=(Loaded(ChipEmbedder, (root, config.model, captions, device)),),
    )
    shards = [*_base_shards(config, root), *_chip_shards(config, root), *_folder_shards(config, cluster)]
    return pipeline, shards


def _base_shards(config: BuildIndexConfig, root: str) -> Iterator[Shard]:
    if config.base:
        for start, rows in _ranges(base_rows(root, config.base).count_rows(), BASE_ROWS_PER_SHARD):
            yield {"shard": f"base-{start:012d}", "base": config.base, "start": start, "rows": rows} | {
                "removed": config.remove_scenes
            }


def _chip_shards(config: BuildIndexConfig, root: str) -> Iterator[Shard]:
    for number, source in enumerate(config.chip_sources):
        for start, rows in _ranges(open_table(root, source.chips).count_rows(), config.rows_per_shard):
            place = {"chips": source.chips, "id_suffix": source.id_suffix, "start": start, "rows": rows}
            yield {"shard": f"chips-{number:03d}-{start:012d}"} | place


def _folder_shards(config: BuildIndexConfig, cluster: Cluster) -> Iterator[Shard]:
    for number, source in enumerate(config.folders):
        place = cluster.resolve(source.path)
        names = only_pictures(storage.list_files(place))
        if not names:
            raise ConfigError(f"folders.{number}.path: no JPEG, PNG or WEBP picture lies below {place}; fix the path")
        about = {"folder": source.path, "place": place} | source.model_dump(exclude={"path"})
        for start, rows in _ranges(len(names), config.rows_per_shard):
            yield {"shard": f"folder-{number:03d}-{start:012d}", "files": names[start : start + rows]} | about


def _ranges(num_rows: int, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, rows_per_shard):
        yield start, min(rows_per_shard, num_rows - start)


def _metrics(meta: IndexMeta) -> dict[str, float]:
    """The numbers of meta.json for MLflow and the manifest."""
    measured = {
        f"index_{name}": getattr(meta, name)
        for name in ("num_partitions", "num_probes", "target_recall", "recall_at_10", "recall_queries")
    }
    sizes = {"chips_indexed": meta.num_rows, "embedding_width": meta.embedding_width}
    return {name: float(value) for name, value in (sizes | measured).items() if value is not None}
