"""Tensors by name become a model: the step that every format of weights ends with. Torch alone, no files.

In: a MammutConfig and exactly its tensors. Out: a Mammut that owns them.
"""

import torch

from rsplatform.model.mammut import Mammut, MammutConfig


class WeightsError(ValueError):
    """Files that do not make a model; the message names the file."""


def model_from_tensors(config: MammutConfig, tensors: dict[str, torch.Tensor], source: str) -> Mammut:
    """A model in eval mode that owns exactly these tensors; missing, extra or misshapen ones are an error."""
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = Mammut(config)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{source}: weights do not fit the config. {error}") from error
    return model.requires_grad_(True).eval()
