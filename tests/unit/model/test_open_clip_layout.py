"""Configs as open_clip writes them: current ones mean what that code computes, what we do not have is named.

The computation is restated here on the blocks of the benchmark's reference, which holds to the original's outputs:
patches are averaged without the class token, texts without pads, and cross-attention reads what was averaged.
"""

import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.reference_mammut import ReferenceMammut, ReferenceShape
from rsplatform.model.mammut import Mammut
from rsplatform.model.openmammut import load_openmammut
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.model.openmammut_export import save_openmammut, tensors_to_layout
from rsplatform.model.state import WeightsError

EMBEDDING = 20
SHAPE = ReferenceShape(32, 2, 2, 8, 16, 24, 4, 3, context_length=12, vocab_size=60, cross_attn_ratio=2)


def open_clip_config(**changes: Any) -> dict[str, Any]:
    """What current open_clip documents for a MaMMUT, with its defaults left out but head_width."""
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "output_tokens": True}
    vision |= {"pool_type": "avg", "final_ln_after_pool": True}
    text = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 4, "cross_attn_ratio": 2}
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "multimodal_cfg": text}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    return config


class MainstreamMammut(nn.Module):
    """Current open_clip's two passes, restated; `projects` is proj_type linear."""

    def __init__(self, *, projects: bool = False) -> None:
        super().__init__()
        self.body = ReferenceMammut(SHAPE).eval()
        width = EMBEDDING if projects else SHAPE.text_width
        self.body.visual.proj = nn.Parameter(torch.randn(SHAPE.vision_width, width) / 6)
        self.projection = nn.Parameter(torch.randn(SHAPE.text_width, width) / 6) if projects else None

    def weights(self) -> dict[str, Tensor]:
        """By current open_clip's names."""
        named = {name: value.clone().contiguous() for name, value in self.body.state_dict().items()}
        named["text.lm_head"] = named.pop("text.text_projection")
        if self.projection is not None:
            named["text.text_projection"] = self.projection.detach().clone()
        return named

    def forward(self, images_BCHW: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image and text embeddings (B, E), caption logits (B, T-1, V)."""
        _, all_tokens_BND = self.body.visual(images_BCHW)
        patches_BND = all_tokens_BND[:, 1:]
        image_BE = self.body.visual.ln_post(patches_BND.mean(1)) @ self.body.visual.proj
        text, valid_BT = self.body.text, tokens_BT != 0
        mask = torch.zeros(len(tokens_BT), 1, tokens_BT.shape[1]).masked_fill(~valid_BT[:, None], float("-inf"))
        mask = mask.expand(-1, tokens_BT.shape[1], -1).repeat_interleave(SHAPE.text_heads, 0)
        x = (text.token_embedding(tokens_BT) + text.positional_embedding).permute(1, 0, 2)
        for block in text.resblocks:
            x = block(x, mask_LL=mask)
        hidden_BTD = text.ln_final(x.permute(1, 0, 2)) * valid_BT[..., None]
        text_BE = hidden_BTD.sum(1) / valid_BT.sum(1, keepdim=True)
        text_BE = text_BE if self.projection is None else text_BE @ self.projection
        logits_BTV, _ = text(tokens_BT[:, :-1], patches_BND @ self.body.map_viz2txt_kv)
        return F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1), logits_BTV


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens_BT = torch.randint(1, 60, (4, 12))
    for row, length in enumerate((12, 7, 3, 1)):
        tokens_BT[row, length:] = 0
    return torch.randn(4, 3, 16, 16), tokens_BT


@torch.no_grad()
@pytest.mark.parametrize("projects", [False, True])
def test_current_open_clip_weights_give_what_that_code_computes(tmp_path, projects):
    torch.manual_seed(0)
    theirs, path = MainstreamMammut(projects=projects), tmp_path / "open_clip_model.safetensors"
    save_file(theirs.weights(), path)
    changes = {"embed_dim": EMBEDDING, "multimodal_cfg__proj_type": "linear"} if projects else {}
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    document = {"model_cfg": open_clip_config(**changes), "preprocess_cfg": {"size": [16, 16], **statistics}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    ours, config = load_openmammut(path)
    assert (config.vision.pixel_mean, config.vision.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images_BCHW, tokens_BT = inputs()
    found = (ours.encode_image(images_BCHW), ours.encode_text(tokens_BT), ours.caption_logits(images_BCHW, tokens_BT))
    said_B = (
        tokens_BT[:, 1:] != 0
    )  # a place whose next token is a pad is not computed by ours and has no loss in either
    for mine, their in zip(found, theirs(images_BCHW, tokens_BT), strict=True):
        rows = (mine, their) if mine.ndim == 2 else (mine[said_B], their[said_B])
        torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-4)
    exported = tensors_to_layout(ours)
    assert exported.keys() == theirs.weights().keys()
    assert all(torch.equal(exported[name], value) for name, value in theirs.weights().items())
    save_openmammut(tmp_path / "again" / "model.safetensors", ours)
    assert load_openmammut(tmp_path / "again" / "model.safetensors")[1] == config


def test_pooling_follows_the_layout_and_what_it_states():
    current = config_of_layout(open_clip_config(), "test")
    assert (current.vision.pooling, current.text.pooling) == ("mean", "masked_mean")
    released = {"multimodal_cfg__pool_type": "avg_all", "multimodal_cfg__use_pad_mask": False}
    converted = config_of_layout(open_clip_config(vision_cfg__pool_type="avg_all", **released), "test")
    fork = {"vision_cfg": {**open_clip_config()["vision_cfg"], "pool_type": "avg_all"}, "custom_text": True}
    fork["text_cfg"] = {**open_clip_config()["multimodal_cfg"], "output_tokens": True, "does_full_decoding": True}
    assert config_of_layout(fork, "test") == converted
    assert (converted.vision.pooling, converted.text.pooling) == ("mean_all", "mean_all")
    fork["text_cfg"] |= {"pool_type": "avg", "use_pad_mask": True}
    assert config_of_layout(fork, "test").text.pooling == "masked_mean"


REFUSED = {
    "vision_cfg__pool_type": ("tok", "vision pool_type 'tok'.*'avg_all' or 'avg'"),
    "vision_cfg__final_ln_after_pool": (False, "vision final_ln_after_pool false"),
    "vision_cfg__attentional_pool": (True, "vision_cfg: attentional_pool True"),
    "vision_cfg__no_ln_pre": (True, "vision_cfg: no_ln_pre True"),
    "vision_cfg__timm_model_name": ("vit", "vision_cfg: timm_model_name 'vit'"),
    "vision_cfg__ls_init_value": (1e-5, "vision_cfg: ls_init_value 1e-05"),
    "vision_cfg__head_width": (15, "32 is not a multiple of head_width 15"),
    "multimodal_cfg__pool_type": ("eos", "text pool_type 'eos'"),
    "multimodal_cfg__use_pad_mask": (False, "text use_pad_mask false with pool_type 'avg'"),
    "multimodal_cfg__proj_type": ("mlp", "text proj_type 'mlp'"),
    "multimodal_cfg__pad_id": (1, "multimodal_cfg: pad_id 1"),
    "multimodal_cfg__text_arch": ("modern", "multimodal_cfg: text_arch 'modern'"),
    "multimodal_cfg__tie_lm_head": (True, "multimodal_cfg: tie_lm_head True"),
    "multimodal_cfg__qk_norm": (True, "multimodal_cfg: qk_norm True"),
    "multimodal_cfg__cross_atn_ratio": (2, "'cross_atn_ratio'.*'cross_attn_ratio'"),
    "quick_gelu": (True, "quick_gelu true"),
    "embed_dim": (20, "embed_dim 20 differs from the text width 24.*proj_type 'linear'"),
    "text_cfg": ({}, "text_cfg beside multimodal_cfg makes it a CoCa"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_model_does_not_have_is_named(name):
    value, words = REFUSED[name]
    with pytest.raises(WeightsError, match=f"some.json.*{words}"):
        config_of_layout(open_clip_config(**{name: value}), "some.json")


@pytest.mark.parametrize(("part", "field"), [("vision_cfg", "head_width"), ("multimodal_cfg", "heads")])
def test_a_head_count_is_never_guessed(part, field):
    config = open_clip_config()
    del config[part][field]
    with pytest.raises(WeightsError, match=field):
        config_of_layout(config, "some.json")
    default_pool = open_clip_config()
    del default_pool["vision_cfg"]["pool_type"]
    with pytest.raises(WeightsError, match="vision pool_type 'tok'"):
        config_of_layout(default_pool, "some.json")


def test_unstated_pooling_of_weights_with_open_clips_names_is_said(tmp_path, caplog):
    """They may be converted openMaMMUT weights, which are read as such, or trained with pads left out."""
    torch.manual_seed(0)
    weights = ReferenceMammut(SHAPE).state_dict()
    weights["text.lm_head"] = weights.pop("text.text_projection")
    path, layout = tmp_path / "m.safetensors", SHAPE.layout_config()
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    with caplog.at_level(logging.WARNING, logger="rsplatform.model"):
        assert load_openmammut(path, layout)[1].text.pooling == "mean_all"
    assert "does not state text pool_type" in caplog.text
    caplog.clear()
    stated = {**layout, "text": {**layout["text"], "pool_type": "avg"}}
    assert load_openmammut(path, stated)[1].text.pooling == "masked_mean"
    assert isinstance(load_openmammut(path, stated)[0], Mammut) and not caplog.text
