"""A saved model is the same model; damaged or ill-fitting files are named."""

import json

import pytest
import torch

from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.state import WeightsError
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.weights import load_model, save_model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Mammut(mammut_config("mini", vocab_size=300, image_size=32, tied_vocabulary=False))
    tokenizer = Tokenizer.train(["fields and roads"], 280)
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model", model


def test_a_saved_model_is_the_same_model(saved):
    folder, model = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded, _ = load_model(folder)
    assert loaded.config == model.config and not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    save_model(folder, loaded, Tokenizer.train(["fields"], 280))  # saving over an older model works


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_or_damaged_file_is_named(saved, name):
    folder, _ = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        load_model(folder)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=name):
        load_model(folder)


def test_weights_that_do_not_fit_the_config_are_refused(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_layers": 5}, {"mlp_width": 100}, {"pooling": "map"}):
        (folder / "config.json").write_text(json.dumps({**config, "vision": {**config["vision"], **change}}))
        with pytest.raises(WeightsError, match="model.safetensors.*do not fit"):
            load_model(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(saved, tmp_path):
    model = Mammut(mammut_config("mini", vocab_size=260))
    with pytest.raises(WeightsError, match="ids"):
        save_model(tmp_path / "other", model, Tokenizer.train(["fields and roads and rivers"], 300))
