"""Imports weights in the openMaMMUT key layout (RECIPE.md "Open weights to start from") into our one model class.

In: a .safetensors file, or a training checkpoint (.pt, .pth, .bin; read with weights_only), and its config from the
argument, the file's metadata or a JSON beside it. Out: (Mammut in eval mode, MammutConfig). Brings no tokenizer.
Reads files; what the names mean is in openmammut_config.py and openmammut_tensors.py.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsplatform.model.mammut import Mammut, MammutConfig
from rsplatform.model.openmammut_config import config_of_layout, states_text_pooling
from rsplatform.model.openmammut_tensors import tensors_of_layout
from rsplatform.model.state import WeightsError, model_from_tensors
from rsplatform.model.weights import read_tensors

# where the config is looked for beside the weights, after <file stem>.json: open_clip's name on model hubs, then ours
BESIDE = ("open_clip_config.json", "config.json")

logger = logging.getLogger("rsplatform.model")


def load_openmammut(path: Path | str, config: Mapping[str, Any] | None = None) -> tuple[Mammut, MammutConfig]:
    """Read openMaMMUT weights.

    `config` is {"vision": {…}, "text": {…}}, or one of open_clip's (openmammut_config.py tells which); without it the
    safetensors metadata's `config` is used, else `<file stem>.json`, `open_clip_config.json` or `config.json` beside
    the file. Tensors named `io.*` are skipped.

    Raises:
        FileNotFoundError: no such file. WeightsError: no config, a config without head counts or with unknown
            keys, weights that do not fit it, or an unreadable file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    found, origin = (config, "config argument") if config is not None else _find_config(path)
    tensors = {key: value for key, value in _read_layout(path).items() if not key.startswith("io.")}
    mammut_config = config_of_layout(found, origin, _num_cross_blocks(tensors))
    if "text.lm_head" in tensors and not states_text_pooling(found):
        logger.warning(
            "%s: weights as current open_clip names them, and a config (%s) that does not state text pool_type: read "
            "as openMaMMUT's 'avg_all', as in converted weights; state 'avg' if open_clip trained them by its default",
            path,
            origin,
        )
    # only models trained with the SigLIP loss have one; their config does not say so
    mammut_config = dataclasses.replace(mammut_config, logit_bias="logit_bias" in tensors)
    try:
        ours = tensors_of_layout(tensors, mammut_config)
    except KeyError as error:
        raise WeightsError(f"{path}: the key {error} of the openMaMMUT layout is missing") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if tensors:
        raise WeightsError(f"{path}: keys that the config ({origin}) has no place for: {sorted(tensors)[:5]}")
    return model_from_tensors(mammut_config, ours, str(path)), mammut_config


def _find_config(path: Path) -> tuple[Mapping[str, Any], str]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
        if "config" in metadata:
            return _parsed(metadata["config"], f"{path} (metadata)")
    for beside in (path.with_suffix(".json"), *(path.with_name(name) for name in BESIDE)):
        if beside.is_file():
            return _parsed(beside.read_text(encoding="utf-8"), str(beside))
    raise WeightsError(
        f"{path}: no config in the metadata and no {path.stem}.json, {' or '.join(BESIDE)} beside it; "
        "pass config={'vision': {...}, 'text': {...}}"
    )


def _parsed(text: str, origin: str) -> tuple[Mapping[str, Any], str]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(parsed, Mapping):
        raise WeightsError(f"{origin}: expected an object with 'vision' and 'text'")
    return parsed, origin


def _num_cross_blocks(tensors: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in tensors if key.startswith("text.cross_attn.")})


def _read_layout(path: Path) -> dict[str, Tensor]:
    """Tensors of the file, unwrapped from `state_dict` and without `module.` prefixes."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly anything on foreign bytes
        raise WeightsError(f"{path}: refused or unreadable with weights_only=True ({error})") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}
