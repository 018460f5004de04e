"""Images per second of a whole training step, ours against the open reproduction's, paired in one run.

In: nothing (random pictures; caption lengths are full, or those of RSICD's train split if its JSON is given). Out: per
size a check that both compute the same loss from the same weights, then images/s of both and the median ratio, once
against the reference as Python starts it and once with the memory setting that our training processes have.
The reference (reference_mammut.py) is the published step restated; where the test data are, it is first held to the
outputs of the original implementation. Needs torch alone (and safetensors for those files), no Ray.
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
from reference_mammut import SHAPES, ReferenceMammut, ReferenceShape, ReferenceStep, conformance_gaps

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


def our_step(model: Mammut) -> Callable[[Batch], float]:
    """Our loop's own step."""
    engine, config = PlainEngine(model, OptimizerConfig()), StepConfig()

    def step(batch: Batch) -> float:
        parts = forward_backward(engine, batch, 0, config)
        engine.step(RATE)
        return float(parts["loss"])

    return step


def make_batch(shape: ReferenceShape, lengths: list[int], generator: torch.Generator) -> Batch:
    """Random pictures and token ids; sample i has lengths[i] tokens, the rest are pads up to the context."""
    size, context = shape.image_size, shape.context_length
    images_BHWC = torch.randint(0, 256, (len(lengths), size, size, 3), dtype=torch.uint8, generator=generator)
    tokens_BT = torch.randint(1, shape.vocab_size, (len(lengths), context), generator=generator)
    tokens_BT[torch.arange(context) >= torch.tensor(lengths)[:, None]] = 0
    return Batch(images_BHWC, tokens_BT, tuple(str(index) for index in range(len(lengths))), torch.arange(len(lengths)))


def rsicd_lengths(path: Path, batch_size: int, context: int) -> list[int]:
    """Words plus start and end of `batch_size` captions of RSICD's train split, evenly spread over it.

    Byte-pair encodings give about one token a word here, so this is a little short of a real tokenizer's lengths.
    """
    images = json.loads(path.read_text())["images"]
    captions = [sentence["raw"] for item in images if item["split"] == "train" for sentence in item["sentences"]]
    lengths = sorted(len(caption.split()) for caption in captions)
    middles = [(2 * index + 1) * len(lengths) // (2 * batch_size) for index in range(batch_size)]
    return [min(context, lengths[middle] + 2) for middle in middles]


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
        self.loss: float = self.pipe.recv()

    def step(self) -> float:
        """Seconds of one more step."""
        self.pipe.send("step")
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send("end")
        self.process.join()


def serve(pipe: Connection, step: Callable[[], float], loss: float) -> None:
    """Say the first loss, then make a step and say its seconds whenever asked."""
    step()
    pipe.send(loss)
    while pipe.recv() == "step":
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)


def run_ours(pipe: Connection, name: str, lengths: list[int], threads: int) -> None:
    """Our loop's step, in a process that keeps its freed memory as our training processes do."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    shape, reference, batch = parts_of(name, lengths)
    is_full = min(lengths) == shape.context_length
    loss = our_step(our_model(shape, reference, skips_pads=False))(batch)
    step, our_batch = (
        our_step(our_model(shape, reference, skips_pads=not is_full)),
        batch if is_full else trimmed(batch),
    )
    serve(pipe, lambda: step(our_batch), loss)


def run_reference(pipe: Connection, name: str, lengths: list[int], threads: int, keeps_memory: bool) -> None:
    """The reference's step, in a process as Python starts it or with our memory setting."""
    torch.set_num_threads(threads)
    if keeps_memory:
        keep_freed_memory()
    _, reference, batch = parts_of(name, lengths)
    images_BCHW = normalise(batch.images_BHWC, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)
    step = ReferenceStep(reference)
    loss = step(images_BCHW, batch.tokens_BT)
    serve(pipe, lambda: step(images_BCHW, batch.tokens_BT), loss)


def parts_of(name: str, lengths: list[int]) -> tuple[ReferenceShape, ReferenceMammut, Batch]:
    """The same shape, seeded weights and batch in every process."""
    torch.manual_seed(0)
    reference = ReferenceMammut(SHAPES[name])
    return SHAPES[name], reference, make_batch(SHAPES[name], lengths, torch.Generator().manual_seed(1))


def compare(name: str, lengths: list[int], repeats: int, threads: int) -> None:
    """Print images/s of all and the median of the paired ratios: steps are taken in turn."""
    sides = {
        "ours": Side(run_ours, name, lengths, threads),
        "reference": Side(run_reference, name, lengths, threads, False),
        "reference with our memory setting": Side(run_reference, name, lengths, threads, True),
    }
    losses = [side.loss for side in sides.values()]
    assert max(losses) - min(losses) < 1e-3, f"{name}: the losses differ: {losses}; the comparison would be unfair"
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


def conformance_folder() -> Path:
    """Where the real data for tests lie, as for tests/conftest.py."""
    data = os.environ.get("RSPLATFORM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(data) / "conformance"


def main() -> None:
    """Parse, check, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--captions", type=Path, help="dataset_rsicd.json, for its train split's caption lengths")
    parser.add_argument(
        "--conformance",
        type=Path,
        default=conformance_folder(),
        help="folder of openmammut_*.safetensors with outputs of the original",
    )
    arguments = parser.parse_args()
    print(f"float32, batch {arguments.batch_size}, {arguments.threads} threads, torch {torch.__version__}")
    hold_to_conformance(arguments.conformance)
    for name in arguments.sizes:
        context = SHAPES[name].context_length
        compare(name, [context] * arguments.batch_size, arguments.repeats, arguments.threads)
        if arguments.captions:
            lengths = rsicd_lengths(arguments.captions, arguments.batch_size, context)
            compare(name, lengths, arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
