"""Images per second of a whole training step, ours against the open reproduction's, paired in one run.

In: random pictures; captions of the full context and, where RSICD's JSON is, captions as long as its train split's.
Out: per size a check that both compute the same losses from the same weights, then images/s of both and the median
ratio, once against the reference as Python starts it and once with the settings that our training processes have:
freed memory kept, and float32 products through oneDNN.
The reference (reference_mammut.py) is the published step restated; where the test data are, it is first held to the
outputs of the original implementation. Needs torch alone (safetensors for those files, tokenizers for RSICD), no Ray.
Run: `python benchmarks/train_step.py` or `python benchmarks/train_step.py --captions …/dataset_rsicd.json`
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from reference_mammut import SHAPES, ReferenceMammut, ReferenceShape, ReferenceStep, conformance_gaps
from torch import Tensor

from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.model.openmammut_tensors import tensors_of_layout
from rsplatform.model.sizes import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from rsplatform.model.state import model_from_tensors
from rsplatform.train.allocator import keep_freed_memory
from rsplatform.train.batch import Batch
from rsplatform.train.engine import PlainEngine
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, forward_backward

RATE = 1e-4
# With so many of our own RSICD's train captions have 14.7 tokens in the mean and at most 46; with the 49,408 of CLIP,
# which are not at hand offline, 14.0 and 37 (counted once). The lengths that we are timed with are rather too long.
VOCABULARY = 1024

Losses = dict[str, float]


def our_model(shape: ReferenceShape, reference: ReferenceMammut, *, skips_pads: bool) -> Mammut:
    """Our model with the reference's weights; `skips_pads` takes masked mean pooling, which never computes pads."""
    layout = shape.layout_config()
    config = config_of_layout(layout, "benchmark")
    tensors = {name: value.detach().clone() for name, value in reference.state_dict().items()}
    model = model_from_tensors(config, tensors_of_layout(tensors, config), "benchmark")
    if skips_pads:
        text = type(config.text)(**{**vars(config.text), "pooling": "masked_mean"})
        ours = Mammut(type(config)(config.vision, text, config.embedding_width))
        ours.load_state_dict(model.state_dict())
        model = ours
    return model.train()


def our_step(model: Mammut) -> Callable[[Batch], Losses]:
    """Our loop's own step; returns the losses before it."""
    engine, config = PlainEngine(model, OptimizerConfig()), StepConfig()

    def step(batch: Batch) -> Losses:
        parts = forward_backward(engine, batch, 0, config)
        engine.step(RATE)
        return {name: float(parts[name]) for name in ("contrastive", "caption")}

    return step


def make_batch(shape: ReferenceShape, lengths: list[int], generator: torch.Generator) -> Batch:
    """Random pictures and token ids; sample i has lengths[i] tokens, the rest are pads up to the context."""
    size, context = shape.image_size, shape.context_length
    images_BHWC = torch.randint(0, 256, (len(lengths), size, size, 3), dtype=torch.uint8, generator=generator)
    tokens_BT = torch.randint(1, shape.vocab_size, (len(lengths), context), generator=generator)
    tokens_BT[torch.arange(context) >= torch.tensor(lengths)[:, None]] = 0
    return Batch(images_BHWC, tokens_BT, tuple(str(index) for index in range(len(lengths))), torch.arange(len(lengths)))


def rsicd_lengths(path: Path, batch_size: int, context: int) -> list[int]:
    """Tokens of `batch_size` captions of RSICD's train split, evenly spread over their lengths, start and end included.

    Raises:
        ImportError: no tokenizers.
    """
    from rsplatform.model.tokenizer import Tokenizer  # not above: full captions do without it

    images = json.loads(path.read_text())["images"]
    captions = [sentence["raw"] for item in images if item["split"] == "train" for sentence in item["sentences"]]
    words = [len(caption.split()) + 2 for caption in captions]
    ids = Tokenizer.train(captions, VOCABULARY).token_ids(captions)
    lengths = sorted(len(row) + 2 for row in ids)
    told = [f"mean {statistics.mean(counts):.1f}, at most {max(counts)}" for counts in (words, lengths)]
    print(f"{path.name}, start and end included: words {told[0]}; of {VOCABULARY} learned tokens {told[1]}")
    middles = [(2 * index + 1) * len(lengths) // (2 * batch_size) for index in range(batch_size)]
    return [min(context, lengths[middle]) for middle in middles]


def trimmed(batch: Batch) -> Batch:
    """The batch as our loader pads it: to its longest caption, rounded up to a multiple of 8."""
    longest = int((batch.tokens_BT != 0).sum(1).max())
    width = min(batch.tokens_BT.shape[1], -(-longest // 8) * 8)
    return replace(batch, tokens_BT=batch.tokens_BT[:, :width])


class Side:
    """One implementation in a process of its own, so that neither lives in the heap that the other left behind."""

    def __init__(self, body: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=body, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()
        self.losses: Losses = self.pipe.recv()

    def step(self) -> float:
        """Seconds of one more step."""
        self.pipe.send("step")
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send("end")
        self.process.join()


def serve(pipe: Connection, step: Callable[[], object], losses: Losses) -> None:
    """Say the losses of the first weights, then make a step and say its seconds whenever asked."""
    step()
    pipe.send(losses)
    while pipe.recv() == "step":
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)


def run_ours(pipe: Connection, name: str, lengths: list[int], threads: int) -> None:
    """Our loop's step, in a process with the settings of our training processes."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_onednn_products()
    shape, reference, batch = parts_of(name, lengths)
    step, batch, losses = our_timed_step(shape, reference, batch)
    serve(pipe, lambda: step(batch), losses)


def our_timed_step(
    shape: ReferenceShape, reference: ReferenceMammut, batch: Batch
) -> tuple[Callable[[Batch], Losses], Batch, Losses]:
    """The step that is timed and its batch, after one step, and the losses from the reference's weights.

    "legacy": those of the legacy model, which pools all positions; the others are the timed model's own.
    """
    is_full = bool((batch.tokens_BT != 0).all())
    legacy = our_step(our_model(shape, reference, skips_pads=False))(batch)
    step = our_step(our_model(shape, reference, skips_pads=not is_full))
    timed_batch = batch if is_full else trimmed(batch)
    return step, timed_batch, step(timed_batch) | {"legacy": sum(legacy.values())}


def run_reference(
    pipe: Connection, name: str, lengths: list[int], threads: int, *settings: Callable[[], object]
) -> None:
    """The reference's step, in a process as Python starts it or with the settings of our training processes."""
    torch.set_num_threads(threads)
    for take in settings:
        take()
    _, reference, batch = parts_of(name, lengths)
    images_BCHW = normalise(batch.images_BHWC, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)
    losses = reference_losses(reference, images_BCHW, batch.tokens_BT)
    step = ReferenceStep(reference)
    losses["legacy"] = step(images_BCHW, batch.tokens_BT)
    serve(pipe, lambda: step(images_BCHW, batch.tokens_BT), losses)


@torch.no_grad()
def reference_losses(reference: ReferenceMammut, images_BCHW: Tensor, tokens_BT: Tensor) -> Losses:
    """What our timed model must lose from the same weights, by the reference's modules.

    The caption loss is the reference's own; the contrastive one is of texts encoded one by one without their pads,
    which is what a mean over the tokens alone comes to.
    """
    texts = [reference.text(tokens_T[tokens_T != 0][None])[1].mean(1) for tokens_T in tokens_BT]
    image_BE, text_BE = (F.normalize(rows, dim=-1) for rows in (reference.visual(images_BCHW)[0], torch.cat(texts)))
    logits_BB = reference.logit_scale.exp() * image_BE @ text_BE.T
    positives_B = torch.arange(len(logits_BB))
    contrastive = (F.cross_entropy(logits_BB, positives_B) + F.cross_entropy(logits_BB.T, positives_B)) / 2
    return {"contrastive": float(contrastive), "caption": float(reference.losses(images_BCHW, tokens_BT)[1])}


def parts_of(name: str, lengths: list[int]) -> tuple[ReferenceShape, ReferenceMammut, Batch]:
    """The same shape, seeded weights and batch in every process."""
    torch.manual_seed(0)
    reference = ReferenceMammut(SHAPES[name])
    return SHAPES[name], reference, make_batch(SHAPES[name], lengths, torch.Generator().manual_seed(1))


def compare(name: str, lengths: list[int], repeats: int, threads: int) -> None:
    """Print images/s of all and the median of the paired ratios: steps are taken in turn."""
    sides = {
        "ours": Side(run_ours, name, lengths, threads),
        "reference": Side(run_reference, name, lengths, threads),
        "reference with our settings": Side(
            run_reference, name, lengths, threads, keep_freed_memory, use_onednn_products
        ),
    }
    hold_to_equal_losses(name, [side.losses for side in sides.values()])
    seconds = {title: [] for title in sides}
    for _ in range(repeats):
        for title, side in sides.items():
            seconds[title].append(side.step())
    for side in sides.values():
        side.close()
    is_full = min(lengths) == SHAPES[name].context_length
    print(f"{name}, {'full captions' if is_full else f'captions of {min(lengths)}–{max(lengths)} tokens'}:")
    for title, taken in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], taken, strict=True))
        pace = len(lengths) / statistics.median(taken)
        print(f"  {pace:5.2f} images/s  {title}" + ("" if title == "ours" else f": ours is {ratio:.2f} × as fast"))


def hold_to_equal_losses(name: str, sides: list[Losses]) -> None:
    """The sides did the same work: each loss is one number."""
    for part in sides[0]:
        found = [losses[part] for losses in sides]
        assert max(found) - min(found) < 1e-3, f"{name}: the {part} losses differ: {found}; it would be no comparison"


def hold_to_conformance(folder: Path) -> None:
    """Say how far the restated reference is from the original implementation's outputs, or why that is not known."""
    files = sorted(folder.glob("openmammut_*.safetensors"))
    if not files or importlib.util.find_spec("safetensors") is None:
        why = "safetensors is not installed" if files else f"no openmammut_*.safetensors in {folder} (--conformance)"
        print(f"the restated reference is not held to the original's outputs: {why}")
        return
    for path in files:
        gaps = conformance_gaps(path)
        assert max(gaps.values()) < 1e-4, f"{path.name}: the reference is not the original: {gaps}"
        print(f"{path.name}: the restated reference is within {max(gaps.values()):.1e} of the original's outputs")


def data_folder() -> Path:
    """Where the real data for tests lie, as for tests/conftest.py."""
    return Path(os.environ.get("RSPLATFORM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def why_no_rsicd(captions: Path) -> str | None:
    """What is missing for RSICD's caption lengths."""
    if importlib.util.find_spec("tokenizers") is None:
        return "tokenizers is not installed"
    return None if captions.is_file() else f"there is no {captions}; name RSICD's dataset_rsicd.json by --captions"


def main() -> None:
    """Parse, check, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--captions",
        type=Path,
        default=data_folder() / "rsicd" / "dataset_rsicd.json",
        help="dataset_rsicd.json, for its train split's caption lengths",
    )
    parser.add_argument(
        "--conformance",
        type=Path,
        default=data_folder() / "conformance",
        help="folder of openmammut_*.safetensors with outputs of the original",
    )
    arguments = parser.parse_args()
    products = "oneDNN" if use_onednn_products() else "torch's own library, since oneDNN loses digits here"
    print(f"float32, batch {arguments.batch_size}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"our settings multiply through {products}")
    hold_to_conformance(arguments.conformance)
    for name in arguments.sizes:
        context = SHAPES[name].context_length
        compare(name, [context] * arguments.batch_size, arguments.repeats, arguments.threads)
        why_not = why_no_rsicd(arguments.captions)
        if why_not is not None:
            print(f"{name}, RSICD's caption lengths: skipped, {why_not}")
            continue
        lengths = rsicd_lengths(arguments.captions, arguments.batch_size, context)
        compare(name, lengths, arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
