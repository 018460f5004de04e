"""A real embedder whose weights are set by hand, so that a test knows its maps: a patch scores by its brightness."""

import torch

from rsplatform.model.embedder import Embedder
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer

WIDTH = 4


def bright_embedder(patch_size: int = 8, image_size: int = 64) -> Embedder:
    """Blocks write nothing to the residual stream; tokens are (b, -b, 1, -1) with b the mean of the patch's pixels."""
    sizes = {f"{part}_{name}": WIDTH for part in ("vision", "text") for name in ("width", "mlp_width")}
    heads = {"vision_num_heads": 1, "text_num_heads": 1, "vision_num_layers": 1, "text_num_layers": 1}
    config = mammut_config("mini", vocab_size=300, patch_size=patch_size, image_size=image_size, **sizes, **heads)
    model = Mammut(config)
    with torch.no_grad():
        for parameter in model.vision.blocks.parameters():
            parameter.zero_()
        weight = model.vision.patch_embedding.weight
        weight.zero_()
        weight[0], weight[1] = 1 / weight.shape[1], -1 / weight.shape[1]
        model.vision.position_HWD.copy_(torch.tensor([0.0, 0.0, 1.0, -1.0]))
        model.vision.projection.weight.copy_(torch.eye(WIDTH))
    return Embedder(model.eval(), Tokenizer.train(["a field"], 280))


def bright_and_dark_texts() -> torch.Tensor:
    """Two unit texts (C, E): the second is nearest to patches brighter than mid-grey, the first to darker ones."""
    return torch.nn.functional.normalize(torch.tensor([[-1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]]), dim=-1)
