"""The recipe of a pretraining run: composes the frozen configs of model, loss, optimizer and loop, checked at load.

In: a YAML's values. Out: `PretrainConfig`, and the model, loader and loop settings that follow from it, some of them
together with the placement: how many samples its card takes at a time.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.config import Config, DatasetArtifact, InputPath, ModelArtifact, StageConfig
from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import MammutConfig, mammut_config
from rsplatform.model.sizes import ModelSize
from rsplatform.model.weights import CONFIG_FILE
from rsplatform.train.augment import Augmentation
from rsplatform.train.checkpoint import KeepBest
from rsplatform.train.curriculum import Curriculum, Phase, RecipeMismatchError
from rsplatform.train.guard import GuardConfig
from rsplatform.train.loader import LoaderConfig, LoaderPhase
from rsplatform.train.memory import SampleShape, WorkerStep, needed_bytes
from rsplatform.train.micro_batch import fitting_micro_batch_size, given_micro_batch_size
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import LoopConfig
from rsplatform.train.traffic import layout_of, model_numbers
from rsplatform.train.validate import VALIDATION_METRICS


class ModelRecipe(Config):
    """A named size and what differs from it: any setting of `mammut_config`, e.g. image_size, vocab_size."""

    size: ModelSize = "tiny"
    settings: dict[str, int | float | str | bool] = {}

    @model_validator(mode="after")
    def _settings_exist(self) -> "ModelRecipe":
        self.mammut_config()
        return self

    def mammut_config(self) -> MammutConfig:
        """The whole model's config."""
        settings: dict[str, Any] = dict(self.settings)
        return mammut_config(self.size, **settings)


class PretrainConfig(StageConfig):
    """What to train, on what, for how long. `start_from` continues a model artifact: sizes, weights and tokenizer.

    The finished model's own image size is that of the last phase, as is the size of the validation pictures: a run
    that ends with larger pictures leaves a model that expects them.

    The newest `keep_checkpoints` stay, and for good each one whose step `keep_every_steps` divides, for `follow`.
    """

    dataset: DatasetArtifact
    split: str = "train"
    validation_split: str | None = None
    seed: int = Field(default=0, ge=0)
    model: ModelRecipe | None = None
    start_from: ModelArtifact | None = None
    tokenizer: InputPath | None = None
    batch_size: int = Field(ge=2)
    phases: list[Phase] = Field(min_length=1)
    augmentation: Augmentation = Augmentation()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch_size: int | None = Field(default=None, ge=1)
    guard: GuardConfig = GuardConfig()
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    max_minutes: float | None = Field(default=None, gt=0)
    cache_gb: float = Field(default=0.0, ge=0)
    report_every_steps: int = Field(default=10, ge=1)
    validate_every_steps: int | None = Field(default=None, ge=1)
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    keep_best: KeepBest | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "PretrainConfig":
        if (self.model is None) == (self.start_from is None):
            raise ValueError("give either `model` (train from scratch) or `start_from` (continue a model artifact)")
        if self.start_from is not None and self.tokenizer is not None:
            raise ValueError("`start_from` brings its own tokenizer; leave `tokenizer` out")
        if self.validate_every_steps is not None and self.validation_split is None:
            raise ValueError("validate_every_steps needs a validation_split, e.g. val")
        if self.model and self.model.mammut_config().logit_bias != (self.loss.contrastive == "sigmoid"):
            raise ValueError("loss.contrastive: sigmoid and model.settings.logit_bias: true belong together; set both")
        curriculum = self.curriculum  # refuses phases that do not follow one another
        if self.model is not None:
            curriculum.image_sizes(self.model.mammut_config())
        return self

    @model_validator(mode="after")
    def _what_is_kept_is_saved(self) -> "PretrainConfig":
        every, saved = self.keep_every_steps, self.checkpoint_every_steps
        if every is not None and (saved is None or every % saved):
            raise ValueError(
                f"keep_every_steps {every} needs a checkpoint at each of these steps: make it a multiple of "
                f"checkpoint_every_steps (now {saved})"
            )
        return self

    @model_validator(mode="after")
    def _the_best_is_measured_and_saved(self) -> "PretrainConfig":
        if self.keep_best is None:
            return self
        if self.keep_best.metric not in VALIDATION_METRICS:
            raise ValueError(
                f"keep_best.metric {self.keep_best.metric!r} is not among what a validation measures: "
                f"{', '.join(VALIDATION_METRICS)}"
            )
        if self.ema_decay is not None and self.keep_best.export == "best":
            raise ValueError(
                "keep_best compares the weights as they are, ema_decay exports their average: drop one, or export last"
            )
        if len({phase.image_size for phase in self.phases}) > 1:
            raise ValueError("keep_best compares validations, which phases of several image sizes make unlike: choose")
        validate_every, checkpoint_every = self.validate_every_steps, self.checkpoint_every_steps
        if validate_every is None or checkpoint_every is None or validate_every % checkpoint_every:
            raise ValueError(
                "keep_best needs a checkpoint of every validated step: give checkpoint_every_steps and "
                f"validate_every_steps, a multiple of it (now {checkpoint_every} and {validate_every})"
            )
        return self

    @property
    def curriculum(self) -> Curriculum:
        """The phases in order."""
        return Curriculum(tuple(self.phases))

    def architecture(self, root: str) -> MammutConfig:
        """The whole model's config, the recipe's own or that of `start_from`.

        Raises:
            ArtifactError: the model that `start_from` names is missing or unfinished.
        """
        if self.model is not None:
            return self.model.mammut_config()
        assert self.start_from is not None, "the recipe's validator demands one of model and start_from"
        folder = open_artifact(root, self.start_from).path("model")
        return MammutConfig.from_dict(storage.read_json(f"{folder}/{CONFIG_FILE}"))

    def worker_step(self, model: MammutConfig, placement: TrainPlacement, num_workers: int) -> WorkerStep:
        """One worker's part of a step at its largest: the largest pictures, texts of the whole context."""
        shape = SampleShape(
            model,
            max(self.curriculum.image_sizes(model)),
            model.text.context_length,
            self.precision,
            placement.recompute_every_blocks,
        )
        return WorkerStep(
            shape,
            layout_of(placement, num_workers),
            model_numbers(model),
            max(1, self.batch_size // num_workers),
            self.loss.contrastive,
            self.ema_decay is not None,
        )

    def chosen_micro_batch_size(self, model: MammutConfig, placement: TrainPlacement, num_workers: int) -> int | None:
        """The recipe's own, else what the placement's card takes; None, the whole batch, where no card is named.

        Raises:
            RecipeMismatchError: the recipe's own number, or even one sample, does not fit the card.
        """
        memory_gb = placement.worker_memory_gb
        if memory_gb is None:
            return self.micro_batch_size
        worker = self.worker_step(model, placement, num_workers)
        if self.micro_batch_size is not None:
            return given_micro_batch_size(worker, memory_gb, self.micro_batch_size)
        return fitting_micro_batch_size(worker, memory_gb)

    def plan_lines(self, cluster: Cluster) -> list[str]:
        """What `--dry-run` says of the phases and of the card.

        Raises:
            RecipeMismatchError: what is to be in memory at once does not fit the card, or the optimizer needs another
                engine.
        """
        if self.optimizer.kind == "muon" and cluster.train.engine == "deepspeed":
            raise RecipeMismatchError(
                "optimizer.kind muon turns matrices, which engine deepspeed keeps as flat pieces: use "
                "cluster.train.engine=fsdp or plain, or optimizer.kind=adamw"
            )
        return [f"note   {remark}" for remark in self.curriculum.remarks] + self._memory_lines(cluster)

    def _memory_lines(self, cluster: Cluster) -> list[str]:
        """Nothing where no card is named."""
        placement = cluster.train
        if placement.worker_memory_gb is None:
            return []
        if self.start_from is not None and not Artifact(cluster.root, self.start_from).is_finished:
            return [f"memory unknown until {self.start_from} is finished"]
        model = self.architecture(cluster.root)
        num_workers = placement.fewest_workers(self.batch_size)  # each has the most to hold then
        worker = self.worker_step(model, placement, num_workers)
        size = self.chosen_micro_batch_size(model, placement, num_workers) or worker.batch_size
        origin = "the recipe's" if self.micro_batch_size is not None else "by arithmetic"
        return [
            f"memory micro_batch_size {min(size, worker.batch_size)} of {worker.batch_size} per worker ({origin}): "
            f"{needed_bytes(worker, min(size, worker.batch_size)) / 1e9:.1f} of {placement.worker_memory_gb:g} GB"
        ]

    def loop_config(self, placement: TrainPlacement, micro_batch_size: int | None) -> LoopConfig:
        """Settings of the loop; how often a checkpoint is due by the clock is a matter of the place."""
        return LoopConfig(
            num_steps=self.curriculum.num_steps,
            seed=self.seed,
            loss=self.loss,
            phase_losses=self.curriculum.losses(self.loss),
            precision=self.precision,
            ema_decay=self.ema_decay,
            max_minutes=self.max_minutes,
            report_every_steps=self.report_every_steps,
            checkpoint_every_steps=self.checkpoint_every_steps,
            checkpoint_every_minutes=placement.checkpoint_every_minutes,
            validate_every_steps=self.validate_every_steps,
            micro_batch_size=micro_batch_size,
            guard=self.guard,
            phase_starts=self.curriculum.phase_starts,
            peak_tflops=placement.peak_tflops_in(self.precision),
        )

    def loader_config(self, model: MammutConfig, decode_threads: int) -> LoaderConfig:
        """Settings of the loader of training batches.

        Raises:
            RecipeMismatchError: a phase's image_size does not divide into the model's patches.
        """
        image_sizes = self.curriculum.image_sizes(model)
        return LoaderConfig(
            image_size=image_sizes[-1],
            context_length=model.text.context_length,
            phases=tuple(
                LoaderPhase(phase.steps, size, phase.augmentation)
                for phase, size in zip(self.phases, image_sizes, strict=True)
            ),
            seed=self.seed,
            augmentation=self.augmentation,
            cache_gb=self.cache_gb,
            decode_threads=decode_threads,
        )
