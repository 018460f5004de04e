"""The importer reproduces the original implementation's outputs, and says what is wrong with bad files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.openmammut import load_openmammut
from rsplatform.model.openmammut_export import save_openmammut, tensors_to_layout
from rsplatform.model.state import WeightsError

FILES = ["openmammut_with_mlp.safetensors", "openmammut_without_mlp.safetensors"]


@pytest.fixture(params=FILES)
def conformance(request, data_root):
    path = data_root / "conformance" / request.param
    assert path.is_file(), f"the real data lack {path}"
    return path


def parts(path):
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    weights = {key: value for key, value in tensors.items() if not key.startswith("io.")}
    return config, weights, {key[3:]: value for key, value in tensors.items() if key.startswith("io.")}


@torch.no_grad()
@pytest.mark.parametrize("products", ["torch's", "onednn's"])
def test_it_reproduces_the_original_outputs(conformance, products):
    if products == "onednn's":
        use_onednn_products()  # which does not where a processor loses digits by it
    model, config = load_openmammut(conformance)
    _, _, io = parts(conformance)
    images_BCHW, tokens_BT = io["image"], io["text"]
    results = {
        "image_features": model.encode_image(images_BCHW),
        "text_features": model.encode_text(tokens_BT),
        "logits": model.caption_logits(images_BCHW, tokens_BT),
        "image_tokens": model.image_tokens(images_BCHW),
    }
    _, losses = mammut_loss(model(images_BCHW, tokens_BT), tokens_BT, LossConfig(mask_identical_texts=False))
    results |= {"contrastive_loss": losses["contrastive"][None], "caption_loss_x2": 2 * losses["caption"][None]}
    for name, result in results.items():
        torch.testing.assert_close(result, io[name], atol=1e-4, rtol=0, msg=name)
    assert model.config == config and config.text.pooling == "mean_all"


def test_what_came_in_goes_out_bit_equal(conformance, tmp_path):
    model, config = load_openmammut(conformance)
    _, weights, _ = parts(conformance)
    exported = tensors_to_layout(model)
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        assert exported[name].shape == tensor.shape and torch.equal(exported[name], tensor), name
    save_openmammut(tmp_path / "out" / "model.safetensors", model)
    again, config_again = load_openmammut(tmp_path / "out" / "model.safetensors")
    assert config_again == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_architecture_that_the_layout_cannot_hold_is_refused(tmp_path):
    ours = Mammut(mammut_config("mini", image_size=32, patch_size=8, vocab_size=64))
    with pytest.raises(WeightsError, match=r"cannot hold (vision|text)\.\w+"):
        save_openmammut(tmp_path / "model.safetensors", ours)
    told = mammut_config("openmammut_S", ground_sample_distance_encoding=True, vocab_size=64, vision_num_layers=1)
    with pytest.raises(WeightsError, match=r"cannot hold vision\.ground_sample_distance_encoding"):
        save_openmammut(tmp_path / "model.safetensors", Mammut(told))
    assert not list(tmp_path.iterdir())


def test_a_logit_bias_comes_in_and_goes_out(conformance, tmp_path):
    config, weights, _ = parts(conformance)
    save_file(weights | {"logit_bias": torch.tensor(-9.5)}, tmp_path / "sigmoid.safetensors")
    model, found = load_openmammut(tmp_path / "sigmoid.safetensors", config)
    assert found.logit_bias and model.logit_bias is not None and model.logit_bias.tolist() == [-9.5]
    save_openmammut(tmp_path / "out.safetensors", model)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logit_bias"], torch.tensor(-9.5))
    assert load_openmammut(tmp_path / "out.safetensors")[1] == found


@torch.no_grad()
def test_training_checkpoints_and_a_config_beside_or_as_argument(conformance, tmp_path):
    config, weights, io = parts(conformance)
    # mainstream open_clip's name of the vocabulary head, inside a training file
    weights["text.lm_head"] = weights.pop("text.text_projection")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "epoch_3.pt")
    from_argument, _ = load_openmammut(tmp_path / "epoch_3.pt", config)
    (tmp_path / "epoch_3.json").write_text(json.dumps({"vision_cfg": config["vision"], "text_cfg": config["text"]}))
    from_beside, _ = load_openmammut(tmp_path / "epoch_3.pt")
    for model in (from_argument, from_beside):
        logits = model.caption_logits(io["image"], io["text"])
        torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)


def test_missing_head_counts_and_unknown_keys_are_errors(conformance):
    config, _, _ = parts(conformance)
    for part, key in (("vision", "head_width"), ("text", "heads"), ("text", "layers")):
        without = {**config, part: {k: v for k, v in config[part].items() if k != key}}
        with pytest.raises(WeightsError, match=f"{part}.*'{key}'"):
            load_openmammut(conformance, without)
    misspelt = {**config, "text": {**config["text"], "head": 4}}
    with pytest.raises(WeightsError, match="'head'.*'heads'"):
        load_openmammut(conformance, misspelt)


def test_weights_that_do_not_fit_are_named(conformance, tmp_path):
    config, weights, _ = parts(conformance)
    path = tmp_path / "weights.safetensors"
    cases = [
        ({k: v for k, v in weights.items() if k != "visual.proj"}, "visual.proj"),
        ({k: v for k, v in weights.items() if not k.startswith("text.resblocks.1.ln_2")}, "do not fit"),
        ({**weights, "text.extra": torch.zeros(1)}, "text.extra"),
    ]
    for changed, match in cases:
        save_file(changed, path)
        with pytest.raises(WeightsError, match=match):
            load_openmammut(path, config)
    save_file(weights, path)
    with pytest.raises(WeightsError, match="no config.*weights.json"):
        load_openmammut(path)
    fewer = {**config, "text": {**config["text"], "layers": config["text"]["layers"] - 1}}
    with pytest.raises(WeightsError, match=r"text\.resblocks"):
        load_openmammut(path, fewer)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_openmammut(tmp_path / "absent.safetensors", config)
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    with pytest.raises(WeightsError, match="bad.pt.*weights_only"):
        load_openmammut(tmp_path / "bad.pt", config)
