"""A model on disk: model.safetensors, config.json and tokenizer.json in one folder.

In: a folder. Out: (Mammut, Tokenizer), or the three files. Never reads a pickle. Does not commit artifacts.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rsplatform.model.mammut import Mammut, MammutConfig
from rsplatform.model.state import WeightsError, model_from_tensors
from rsplatform.model.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


def save_model(folder: Path, model: Mammut, tokenizer: Tokenizer) -> None:
    """Write the three files, each whole or not at all; the folder is made if it is missing."""
    if tokenizer.vocab_size > model.config.text.vocab_size:
        raise WeightsError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.text.vocab_size}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    unfinished = folder / (WEIGHTS_FILE + ".unfinished")
    save_file(tensors, unfinished)
    os.replace(unfinished, folder / WEIGHTS_FILE)
    unfinished = folder / (CONFIG_FILE + ".unfinished")
    unfinished.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / CONFIG_FILE)
    tokenizer.save(folder / TOKENIZER_FILE)


def load_model(folder: Path) -> tuple[Mammut, Tokenizer]:
    """The model (on the CPU, in eval mode, in the dtype of its file: what trains or embeds casts) and its tokenizer.

    Raises:
        WeightsError: a file is missing or damaged, or does not fit the config.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: missing; a model folder is what save_model writes")
    try:
        mapping = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config = MammutConfig.from_dict(mapping)
    except ValueError as error:
        raise WeightsError(f"{folder / CONFIG_FILE}: {error}") from error
    model = model_from_tensors(config, read_tensors(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return model, Tokenizer.load(folder / TOKENIZER_FILE)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; a damaged one raises with its name."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
