"""What a training step needs of a card's memory, from the model's shape: arithmetic, no measurement, no device.

In: a model's config, the engine's layout, precision, recomputation, sizes of pictures, texts and batch. Out: bytes;
micro_batch.py chooses by them. What a sample keeps for the backward pass and the peak of a plain step are held to real
bytes on a CPU (tests/unit/train/test_memory.py). Not measured: any GPU, where attention is taken to run fused, as
torch's own does on a CPU too, so that its weights are never stored; what the sharding engines hold, which is read off
their code; blocks that torch.compile runs, which are taken to keep what plain ones do.
Shapes: B own batch, G global batch, T tokens, S image tokens, V vocabulary, D width, E embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rsplatform.model.mammut import MammutConfig
from rsplatform.train.engine import BUCKET_NUMBERS
from rsplatform.train.meter import num_image_tokens
from rsplatform.train.traffic import Layout, ModelNumbers, state_bytes

FLOAT32_BYTES = 4
# Rows of logits that the caption loss makes at once: `vocabulary_loss`'s default.
LOGITS_CHUNK_ROWS = 2048
# DeepSpeed's reduce_bucket_size, which it allocates whole, in float32, from stage 1 on.
DEEPSPEED_BUCKET_NUMBERS = 500_000_000
# Of a pair of the contrastive loss (B x G) at its peak, as measured on a CPU.
PAIR_BYTES = {"softmax": 20, "focal_sigmoid": 68, "sigmoid": 24}


@dataclass(frozen=True)
class SampleShape:
    """What decides the bytes of one sample. `num_tokens` is the longest text's, `image_size` the largest picture's.

    `device_type`: under bfloat16, CUDA runs every norm in float32 and the CPU in its input's precision.
    """

    model: MammutConfig
    image_size: int
    num_tokens: int
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute_every_blocks: int | None = None
    device_type: Literal["cuda", "cpu"] = "cuda"

    @property
    def compute_bytes(self) -> int:
        """Of a number in matrix products and what lies between them; the residual stream is float32 in either."""
        return 2 if self.precision == "bfloat16" else FLOAT32_BYTES

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture in the blocks."""
        return num_image_tokens(replace(self.model, vision=replace(self.model.vision, image_size=self.image_size)))

    @property
    def text_passes(self) -> tuple[int, int]:
        """Tokens of a text in the contrastive and in the generative pass."""
        text = self.model.text
        return text.context_length if text.pooling == "mean_all" else self.num_tokens, max(1, self.num_tokens - 1)


@dataclass(frozen=True)
class Block:
    """What one block keeps of one sample for its backward pass; where it is recomputed, `input` alone."""

    whole: float
    input: float


def kept_bytes_per_sample(shape: SampleShape) -> float:
    """Bytes of a sample that live between the forward and the backward pass."""
    blocks = 0.0
    for stack in _stacks(shape):
        for index, block in enumerate(stack):
            every = shape.recompute_every_blocks
            blocks += block.input if every is not None and index % every == 0 else block.whole
    model = shape.model
    # pooled features, embeddings before and after they have unit length, and what their norms keep
    vectors = FLOAT32_BYTES * 2 * (model.vision.width + model.text.width + 2 * model.embedding_width)
    return blocks + _vision_rest(shape) + _text_rest(shape) + vectors


def _stacks(shape: SampleShape) -> Iterator[list[Block]]:
    """The blocks in order, as often as a step runs them: picture, contrastive pass, generative pass, cross blocks."""
    vision, text = shape.model.vision, shape.model.text
    block = _self_block(shape, shape.num_image_tokens, (vision.width, vision.num_heads), vision.mlp_width, packs=False)
    yield [block] * vision.num_layers
    packs = text.pooling == "masked_mean"
    for num_tokens in shape.text_passes:
        yield [
            _self_block(shape, num_tokens, (text.width, text.num_heads), mlp_width, packs=packs)
            for index in range(text.num_layers)
            for mlp_width in [text.mlp_width * (text.self_mlp_before_cross or index % text.cross_attention_every != 0)]
        ]
    yield [_cross_block(shape, packs=packs)] * len(range(0, text.num_layers, text.cross_attention_every))


def _self_block(
    shape: SampleShape, num_tokens: int, width_and_heads: tuple[int, int], mlp_width: int, *, packs: bool
) -> Block:
    """Input of the norm, its two statistics, then inputs of the projections, q, k, v, attention's output and its
    logarithm of sums per head. Texts without pads in between have the output a second time, packed again."""
    width, num_heads = width_and_heads
    numbers = (1 + 3 + 1 + packs) * width
    attention = FLOAT32_BYTES * (width + 2 + num_heads) + shape.compute_bytes * numbers
    whole = num_tokens * (attention + _mlp(shape, width, mlp_width))
    return Block(whole, num_tokens * width * FLOAT32_BYTES)


def _cross_block(shape: SampleShape, *, packs: bool) -> Block:
    """As `_self_block`, with keys and values from the picture. Its features are one tensor for all cross blocks, of
    which CUDA makes each norm a float32 copy."""
    text, num_tokens = shape.model.text, shape.text_passes[1]
    query = FLOAT32_BYTES * (text.width + 2 + text.num_heads) + shape.compute_bytes * (1 + 1 + 1 + packs) * text.width
    casts = shape.precision == "bfloat16" and shape.device_type == "cuda"
    image = FLOAT32_BYTES * (2 + casts * text.width) + shape.compute_bytes * (1 + 2) * text.width
    whole = num_tokens * (query + _mlp(shape, text.width, text.mlp_width * text.cross_mlp))
    return Block(whole + shape.num_image_tokens * image, num_tokens * text.width * FLOAT32_BYTES)


def _mlp(shape: SampleShape, width: int, mlp_width: int) -> float:
    """Of one token: its norm, and the inputs of both projections and of what lies between them."""
    if not mlp_width:
        return 0.0
    return FLOAT32_BYTES * (width + 2) + shape.compute_bytes * (width + 2 * mlp_width)


def _vision_rest(shape: SampleShape) -> float:
    """Of one sample outside of the picture's blocks: patches, norms, pooling, the features that the text reads."""
    vision, size = shape.model.vision, shape.compute_bytes
    grid, num_tokens = shape.image_size // vision.patch_size, shape.num_image_tokens
    total = size * 3.0 * shape.image_size**2
    if vision.cropped_positions:
        learned = vision.image_size // vision.patch_size
        total += size * (grid * learned * vision.width + grid**2 * learned)
    if vision.ground_sample_distance_positions:
        total += FLOAT32_BYTES * grid**2 * vision.width
    if vision.input_norm:
        total += num_tokens * FLOAT32_BYTES * (vision.width + 2)
    total += num_tokens * size * (vision.width + shape.model.text.width)
    if vision.pooling == "map":
        is_cast = shape.precision == "bfloat16"
        norm = FLOAT32_BYTES * 2 + is_cast * FLOAT32_BYTES * vision.width
        total += num_tokens * (norm + size * (2 + is_cast) * vision.width + FLOAT32_BYTES * vision.num_heads)
        total += size * 2 * (vision.width + vision.mlp_width)
    return total


def _text_rest(shape: SampleShape) -> float:
    """Of one sample outside of the text's blocks: the last norm's input in either pass, the gradient of the hidden
    states, which the caption loss makes beforehand, and the hidden states that are handed out."""
    width = shape.model.text.width
    norms = sum(shape.text_passes) * FLOAT32_BYTES * (width + 2)
    return norms + shape.text_passes[1] * (shape.compute_bytes + FLOAT32_BYTES) * width


@dataclass(frozen=True)
class WorkerStep:
    """One worker's part of a step: `batch_size` own samples, on `layout.num_devices` workers together.

    `keeps_average`: a moving average of the weights lies beside them, sharded where they are.
    """

    shape: SampleShape
    layout: Layout
    numbers: ModelNumbers
    batch_size: int
    contrastive: Literal["softmax", "focal_sigmoid", "sigmoid"] = "softmax"
    keeps_average: bool = False


def needed_bytes(worker: WorkerStep, micro_batch_size: int) -> float:
    """The most that a worker holds at once when `micro_batch_size` of its samples are in memory at a time."""
    is_split = micro_batch_size < worker.batch_size
    kept = kept_bytes_per_sample(worker.shape) * micro_batch_size + _vocabulary_bytes(worker.shape)
    contrastive = contrastive_bytes(worker)
    if is_split:  # the loss is made before anything is kept, from the embeddings of all samples
        rows = 2 * worker.batch_size * worker.numbers.embedding_width * FLOAT32_BYTES
        step = 2 * rows + max(kept + _workspace_bytes(worker.shape, micro_batch_size), contrastive)
    else:
        step = kept + max(_workspace_bytes(worker.shape, micro_batch_size), contrastive)
    return held_bytes(worker, is_split=is_split) + max(step, _between_steps_bytes(worker, is_split=is_split))


def _workspace_bytes(shape: SampleShape, num_samples: int) -> float:
    """What lives for a moment beside what is kept: pixels and a chunk of logits in the forward pass; in the backward
    pass the gradients inside of one block, the block itself where it is recomputed, and the vocabulary's gradient."""
    vision, text, size = shape.model.vision, shape.model.text, shape.compute_bytes
    rows = min(LOGITS_CHUNK_ROWS, num_samples * shape.text_passes[1])
    # float32 logits and their exponentials; under bfloat16 a copy on either way
    logits = rows * text.vocab_size * (2 * FLOAT32_BYTES + (size if size < FLOAT32_BYTES else 0))
    pixels = num_samples * 3 * shape.image_size**2 * FLOAT32_BYTES
    inside = max(
        tokens * (2 * mlp_width * size + 3 * width * FLOAT32_BYTES)
        for tokens, width, mlp_width in (
            (shape.num_image_tokens, vision.width, vision.mlp_width),
            (max(shape.text_passes), text.width, text.mlp_width),
        )
    )
    again = 0.0 if shape.recompute_every_blocks is None else max(b.whole for stack in _stacks(shape) for b in stack)
    return max(pixels + logits, num_samples * (inside + again) + 2 * _vocabulary_bytes(shape))


def _vocabulary_bytes(shape: SampleShape) -> float:
    """The gradient of the vocabulary matrix (V, D), which the caption loss makes in the forward pass."""
    return shape.model.text.vocab_size * shape.model.text.width * FLOAT32_BYTES


def contrastive_bytes(worker: WorkerStep) -> float:
    """The loss over B x G pairs, with the features of all workers (G, E) and their gradients."""
    global_batch = worker.batch_size * worker.layout.num_devices
    features = 4 * global_batch * worker.numbers.embedding_width * FLOAT32_BYTES
    return worker.batch_size * global_batch * PAIR_BYTES[worker.contrastive] + features


def held_bytes(worker: WorkerStep, *, is_split: bool) -> float:
    """What stays from step to step and gradients: `state_bytes`, the moving average, and what the engine adds.

    ZeRO 1 to 3 keep a float32 copy of their shard of the weights and a bucket for gradients; ZeRO 2, 3 and FSDP2 have
    whole gradients between micro-batches. FSDP2 collects the root and two blocks at a time.
    """
    layout, numbers = worker.layout, worker.numbers
    whole = numbers.total * FLOAT32_BYTES
    total = state_bytes(layout, numbers, autocasts=worker.shape.precision == "bfloat16")
    shares = layout.devices_per_copy if layout.engine in ("zero3", "fsdp") else 1
    total += whole / shares * worker.keeps_average
    if layout.engine in ("zero1", "zero2", "zero3"):
        total += whole / layout.devices_per_copy + DEEPSPEED_BUCKET_NUMBERS * FLOAT32_BYTES
    if is_split:  # of what runs in both passes, the first pass's gradients wait beside those of earlier pieces
        total += FLOAT32_BYTES * numbers.text_blocks
    if layout.engine in ("zero2", "zero3", "fsdp") and is_split:
        total += whole * (1 - 1 / layout.devices_per_copy)
    if layout.engine == "fsdp":
        in_blocks = numbers.total - numbers.rest
        total += FLOAT32_BYTES * 2 * (numbers.rest + 2 * in_blocks / (numbers.num_units - 1))
    return total


def _between_steps_bytes(worker: WorkerStep, *, is_split: bool) -> float:
    """Beside `held_bytes`, where no sample is in memory: DeepSpeed collects weights and moments whole for a checkpoint,
    in place of gradients and bfloat16 weights; plain workers average gradients in buckets."""
    layout, whole = worker.layout, worker.numbers.total * FLOAT32_BYTES
    if layout.engine in ("zero1", "zero2", "zero3"):
        gradients = whole if is_split or layout.engine == "zero1" else whole / layout.devices_per_copy
        return 3 * whole - gradients - (whole / 2 if worker.shape.precision == "bfloat16" else 0)
    return 2 * BUCKET_NUMBERS * FLOAT32_BYTES if layout.num_devices > 1 else 0.0
