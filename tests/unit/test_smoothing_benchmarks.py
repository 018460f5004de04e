"""The ablation's attention is the trained one where it should be, its rows share what they say, and timings run."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import localize
from benchmarks.ablate_smoothing import AlikeAttention, attending_alike, readouts
from rsplatform.localize.picture import AS_IT_IS, picture_maps
from rsplatform.model.embedder import Embedder
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.transformer import SelfAttention


def embedder(pooling: str) -> Embedder:
    torch.manual_seed(0)
    narrow = {f"{part}_{name}": 32 for part in ("vision", "text") for name in ("width", "mlp_width")}
    config = mammut_config("mini", vocab_size=300, vision_num_layers=2, vision_pooling=pooling, **narrow)
    return Embedder(Mammut(config), Tokenizer.train(["a field"], 280))


def test_what_is_alike_is_the_trained_attention_where_queries_keys_and_values_are_one() -> None:
    torch.manual_seed(0)
    trained, features_BTD = SelfAttention(8, 2), torch.randn(2, 5, 8)
    with torch.no_grad():
        trained.qkv.weight[8:] = trained.qkv.weight[:8].repeat(2, 1)
        trained.qkv.bias[8:] = trained.qkv.bias[:8].repeat(2)
        trained.out.bias.zero_()
        expected = trained(features_BTD)
        for kinds, times in (("q", 1), ("k", 1), ("v", 1), ("qk", 2)):
            torch.testing.assert_close(AlikeAttention(trained, kinds)(features_BTD), times * expected)


@pytest.mark.parametrize("pooling", ["map", "mean"])
def test_rows_share_grid_weights_and_raw_patches(pooling: str) -> None:
    model = embedder(pooling)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    image = np.random.default_rng(0).integers(0, 256, (80, 144, 3), dtype=np.uint8)
    texts_PE = torch.from_numpy(model.embed_texts(["a field", "water"]))
    rows: dict[str, torch.Tensor] = {}
    for readout in readouts(model):
        rows |= readout(image, texts_PE, AS_IT_IS)
    assert {maps_PHW.shape for maps_PHW in rows.values()} == {(2, 10, 18)}
    assert all(
        (one - other).abs().max() > 1e-6 for one, other in zip(rows.values(), list(rows.values())[1:], strict=False)
    )
    assert torch.equal(rows["window mean, w = 1"], picture_maps(model, image, texts_PE, narrower=[1])[2:])
    softmax = {name for name in rows if name.startswith("window softmax")}
    assert bool(softmax) == (pooling == "map")
    if softmax:
        torch.testing.assert_close(rows["window softmax, w = 1"], rows["window mean, w = 1"])
    attending_alike(model, "v")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_the_timings_run_at_a_small_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = f"--grid 6 --width 32 --embedding 16 --texts 3 --repeats 1 --threads {torch.get_num_threads()}"
    monkeypatch.setattr(sys, "argv", ["localize.py", *sizes.split(), "--only", "pooling"])
    precision = torch.get_float32_matmul_precision()
    try:
        localize.main()
    finally:
        torch.set_float32_matmul_precision(precision)  # the benchmark's is for its whole process
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "unfold / smooth" in line]) == 4
