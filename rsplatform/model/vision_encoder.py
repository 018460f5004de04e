"""Vision transformer: normalised pixels in, one feature per patch and one pooled embedding out.

Takes any height and width that are multiples of the patch: the learned position grid is interpolated.
Does not decode or normalise pictures (preprocess.py) and does not scale embeddings to unit length (mammut.py).
Shapes: B batch, C channels, H W pixels or patch grid, N tokens, D width, K pooling heads, E embedding.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsplatform.model.draws import PATCH_DROPOUT, fresh_keys, random_bits
from rsplatform.model.positions import cropped_positions, interpolate_positions
from rsplatform.model.scale_encoding import ScaleEncoding, ScalePositions
from rsplatform.model.transformer import EncoderBlock, Mlp, fill_normal, initialise_blocks


@dataclass(frozen=True)
class VisionConfig:
    """A ViT. Pooling: "map" learned-query attention, "mean" over patches, "mean_all" over patches and class token.

    `ground_sample_distance_encoding`: patches are told how many metres a pixel covers.
    `ground_sample_distance_positions`: they get positions on a grid of metres beside the learned ones
    (scale_encoding.py has both).
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    pooling: Literal["map", "mean", "mean_all"] = "mean"
    class_token: bool = False
    input_norm: bool = False
    position_interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    cropped_positions: bool = False
    cropped_position_grid: int = 64
    patch_dropout: float = 0.0
    ground_sample_distance_encoding: bool = False
    ground_sample_distance_positions: bool = False
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if self.pooling not in ("map", "mean", "mean_all"):
            raise ValueError(f"vision.pooling: '{self.pooling}' is not one of map, mean, mean_all")
        if self.position_interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"vision.position_interpolation: '{self.position_interpolation}' is unknown")
        if self.width % self.num_heads:
            raise ValueError(f"vision.width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"vision.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.ground_sample_distance_positions and self.width % 4:
            raise ValueError(
                f"vision.width {self.width} is not a multiple of 4, as ground_sample_distance_positions need"
            )
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"vision.patch_dropout {self.patch_dropout} is not in [0, 1)")

    @property
    def pools_class_token(self) -> bool:
        """Whether a class token takes part in the pooling, and so in what cross-attention reads."""
        return self.class_token and self.pooling != "mean"


class PatchFeatures(NamedTuple):
    """What pooling reads, per patch: pooling `values` over every token with these gives the image embedding.

    `scores_BKHW` (q·k/√d of each pooling head, head h owns the h-th slice of D) is None where pooling is a mean.
    A class token that takes part in the pooling has no place on the grid: its value and scores stand apart. A
    pooling over windows of the grid leaves it out (our default: it belongs to the whole picture, not to a place).
    """

    values_BHWD: Tensor
    scores_BKHW: Tensor | None
    class_value_BD: Tensor | None = None
    class_scores_BK: Tensor | None = None


def pool_values(values_BND: Tensor, scores_BKN: Tensor | None) -> Tensor:
    """Pool values over tokens -> (B, D): the mean, or per head the softmax-weighted sum of its slice of D."""
    if scores_BKN is None:
        return values_BND.mean(1)
    batch, num_tokens, width = values_BND.shape
    num_heads = scores_BKN.shape[1]
    values_BKNd = values_BND.view(batch, num_tokens, num_heads, width // num_heads).transpose(1, 2)
    weights_BK1N = scores_BKN.softmax(-1).unsqueeze(2)
    return (weights_BK1N.to(values_BKNd.dtype) @ values_BKNd).flatten(1)


class AttentionPool(nn.Module):
    """Multi-head attention pooling with one learned query, then an MLP (the MAP head of SoViT)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.query_Kd = nn.Parameter(torch.empty(num_heads, width // num_heads))
        # no key bias: it would be the same for all tokens, and the softmax drops it
        self.key_KdD = nn.Parameter(torch.empty(num_heads, width // num_heads, width))
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, N, D), and q·k/√d per head (B, K, N): the constant query is folded into the key weights."""
        folded_KD = torch.einsum("kd,kdx->kx", self.query_Kd, self.key_KdD) * self.query_Kd.shape[1] ** -0.5
        return self.value(tokens_BND), F.linear(tokens_BND, folded_KD).transpose(1, 2)

    def finish(self, pooled_BD: Tensor) -> Tensor:
        """What follows the weighted sum: output projection, then a residual MLP."""
        projected_BD = self.out(pooled_BD)
        return projected_BD + self.mlp(self.norm_mlp(projected_BD))


class VisionEncoder(nn.Module):
    """images (B, C, H, W) -> tokens (B, N, D) before the last norm; `embed_tokens` pools them to (B, E)."""

    def __init__(self, config: VisionConfig, embedding_width: int):
        super().__init__()
        self.config = config
        width, grid = config.width, config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.position_HWD = nn.Parameter(torch.empty(grid, grid, width))
        self.class_token_D = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.scale_encoding = ScaleEncoding(width) if config.ground_sample_distance_encoding else None
        self.scale_positions = ScalePositions(width) if config.ground_sample_distance_positions else None
        # only ever added to the class token; apart so that a checkpoint of others goes out as it came in
        self.class_position_D = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.norm_input = nn.LayerNorm(width) if config.input_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            EncoderBlock(width, config.num_heads, config.mlp_width) for _ in range(config.num_layers)
        )
        self.norm_output = nn.LayerNorm(width)
        uses_map = config.pooling == "map"
        self.pool = AttentionPool(width, config.num_heads, config.mlp_width) if uses_map else None
        self.projection = nn.Linear(width, embedding_width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        scale = self.config.width**-0.5
        initialise_blocks(self.blocks, self.config.width, self.config.num_layers)
        fill_normal(self.patch_embedding.weight, std=self.patch_embedding.in_features**-0.5)
        fill_normal(self.position_HWD, std=scale)
        fill_normal(self.projection.weight, std=scale)
        for parameter in (self.class_token_D, self.class_position_D):
            if parameter is not None:
                fill_normal(parameter, std=scale)
        if self.pool is not None:
            initialise_blocks(self.pool, self.config.width, 1)
            fill_normal(self.pool.query_Kd, std=scale)
            fill_normal(self.pool.key_KdD, std=scale)

    def forward(
        self,
        images_BCHW: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        sample_keys_B: Tensor | None = None,
        *,
        keeps_patches: bool = False,
    ) -> Tensor:
        """Tokens (B, N, D) before the last norm: what pooling and cross-attention read. A class token comes first,
        but with pooling "mean", which leaves it out, it has only been attended to (as in open_clip).

        Distances in metres per pixel of these images: None or NaN is unknown and adds nothing. What is drawn at
        random in training follows from the samples' keys (draws.py), None: from torch's generator. `keeps_patches`: no
        patch dropout, in training either, for those who need the whole grid.
        """
        keys_B = self._drawing_keys(images_BCHW, sample_keys_B)
        patches_BHWD = self.patch_embedding(self._patches(images_BCHW))
        if ground_sample_distance_m_B is None:  # run all the same: engines want each parameter in each step
            ground_sample_distance_m_B = patches_BHWD.new_full((len(patches_BHWD),), torch.nan)
        if self.scale_encoding is not None:
            patches_BHWD = patches_BHWD + self.scale_encoding(ground_sample_distance_m_B)[:, None, None]
        if self.scale_positions is not None:
            patches_BHWD = patches_BHWD + self.scale_positions(ground_sample_distance_m_B, patches_BHWD.shape[1:3])
        tokens_BND = (patches_BHWD + self._positions(patches_BHWD, keys_B)).flatten(1, 2)
        if keys_B is not None and self.config.patch_dropout > 0 and not keeps_patches:
            tokens_BND = drop_patches(tokens_BND, self.config.patch_dropout, keys_B)
        if self.class_token_D is not None and self.class_position_D is not None:
            class_D = (self.class_token_D + self.class_position_D).to(tokens_BND.dtype)
            class_B1D = class_D.expand(len(tokens_BND), 1, -1)
            tokens_BND = torch.cat([class_B1D, tokens_BND], dim=1)
        tokens_BND = self.norm_input(tokens_BND)
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        is_done = self.config.class_token and not self.config.pools_class_token
        return tokens_BND[:, 1:] if is_done else tokens_BND

    def _patches(self, images_BCHW: Tensor) -> Tensor:
        """Cut into patches (B, H/P, W/P, C·P·P): a reshape and one matmul are faster than a strided convolution."""
        size = self.config.patch_size
        batch, channels, height, width = images_BCHW.shape
        if height % size or width % size:
            raise ValueError(
                f"image of {height}x{width} px does not divide into patches of {size} px: resize or crop it first"
            )
        cut = images_BCHW.view(batch, channels, height // size, size, width // size, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // size, width // size, -1)

    def _drawing_keys(self, images_BCHW: Tensor, sample_keys_B: Tensor | None) -> Tensor | None:
        """A key per sample where anything is drawn at random, else None."""
        if not (self.training and (self.config.cropped_positions or self.config.patch_dropout > 0)):
            return None
        return fresh_keys(len(images_BCHW), images_BCHW.device) if sample_keys_B is None else sample_keys_B

    def _positions(self, patches_BHWD: Tensor, keys_B: Tensor | None) -> Tensor:
        _, height, width, _ = patches_BHWD.shape
        if keys_B is not None and self.config.cropped_positions:
            grid = self.config.cropped_position_grid
            return cropped_positions(self.position_HWD, keys_B, (height, width), upsampled=grid)
        return interpolate_positions(self.position_HWD, (height, width), self.config.position_interpolation)

    def _values_and_scores(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.pool is None:
            return tokens_BND, None
        return self.pool(self.norm_output(tokens_BND))

    def embed_tokens(self, tokens_BND: Tensor) -> Tensor:
        """Pool tokens of `forward` into the embedding space (B, E), not yet of unit length."""
        values_BND, scores_BKN = self._values_and_scores(tokens_BND)
        return self.head(pool_values(values_BND, scores_BKN))

    def head(self, pooled_D: Tensor) -> Tensor:
        """Map a pooled value (..., D) to the embedding space (..., E), not yet of unit length."""
        if self.pool is None:
            return self.projection(self.norm_output(pooled_D))
        return self.projection(self.pool.finish(pooled_D))

    def patch_features(
        self,
        images_BCHW: Tensor,
        ground_sample_distance_m_B: Tensor | None = None,
        sample_keys_B: Tensor | None = None,
    ) -> PatchFeatures:
        """Values and pooling scores of every patch on the picture's own grid: the input of smooth attention."""
        size = self.config.patch_size
        grid = (images_BCHW.shape[2] // size, images_BCHW.shape[3] // size)
        tokens_BND = self(images_BCHW, ground_sample_distance_m_B, sample_keys_B, keeps_patches=True)
        values_BND, scores_BKN = self._values_and_scores(tokens_BND)
        has_class = self.config.pools_class_token
        first = 1 if has_class else 0
        scores = None if scores_BKN is None else scores_BKN[:, :, first:].unflatten(2, grid)
        return PatchFeatures(
            values_BHWD=values_BND[:, first:].unflatten(1, grid),
            scores_BKHW=scores,
            class_value_BD=values_BND[:, 0] if has_class else None,
            class_scores_BK=scores_BKN[:, :, 0] if has_class and scores_BKN is not None else None,
        )


def drop_patches(tokens_BND: Tensor, fraction: float, keys_B: Tensor) -> Tensor:
    """Keep a random subset of patches, another one per sample key (training only); at least one is kept."""
    _, num_patches, width = tokens_BND.shape
    num_kept = max(1, round(num_patches * (1 - fraction)))
    kept_BM = random_bits(keys_B, PATCH_DROPOUT, num_patches).topk(num_kept, dim=1).indices
    return tokens_BND.gather(1, kept_BM.unsqueeze(-1).expand(-1, -1, width))
