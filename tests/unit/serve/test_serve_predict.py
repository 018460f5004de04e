"""POST /predict as clients of the closed product send it: what they may send along, how much, what they get."""

from typing import Any

import numpy as np
import pytest
from test_serve_http import app, picture, post, retrieval

from rsplatform.serve.predict import MAX_INSTANCES, MAX_PREDICT_TEXTS
from rsplatform.serve.retrieval import Retrieval

__all__ = ["app", "retrieval"]  # fixtures


@pytest.mark.parametrize(
    "parameters",
    [None, {}, {"batch_size": None}, {"batch_size": 4096}, {"batch_size": 2, "confidence": 0.5, "x": {"y": [1]}}],
)
def test_parameters_are_taken_whatever_they_hold_and_change_nothing(app: Any, parameters: Any) -> None:
    body = {"instances": [{"text": "road"}]}
    answer = post(app, "/predict", body | {"parameters": parameters})
    assert answer.status_code == 200 and answer.json() == post(app, "/predict", body).json()


def test_many_instances_get_one_prediction_each_in_their_order(app: Any, retrieval: Retrieval) -> None:
    images = [picture(size) for size in ((64, 64), (64, 90), (50, 64))]
    classes = [f"class {n}" for n in range(40)]
    kinds = [{"image": images[0]}, {"text": "road"}, {"image": images[1], "texts": classes}, {"image": images[2]}]
    instances = [kinds[n % 4] for n in range(60)]
    found = post(app, "/predict", {"instances": instances}).json()["predictions"]
    assert len(found) == 60
    image_IE = retrieval.embedder.embed_images([retrieval.picture(image) for image in images])
    texts_TE = retrieval.embedder.embed_texts(["road", *classes])
    expected = [image_IE[0], texts_TE[0], texts_TE[1:] @ image_IE[1], image_IE[2]]
    for number, prediction in enumerate(found):
        (name,) = prediction
        assert name == ("scores" if number % 4 == 2 else "embedding")
        assert np.allclose(prediction[name], expected[number % 4], atol=1e-4)


@pytest.mark.parametrize(
    ("instances", "words"),
    [
        ([{"text": "a"}] * (MAX_INSTANCES + 1), ["instances", str(MAX_INSTANCES)]),
        (
            [{"image": "AAAA", "texts": [f"{n} {m}" for m in range(300)]} for n in range(2)],
            ["instances", "600", str(MAX_PREDICT_TEXTS)],
        ),
    ],
)
def test_more_than_one_request_may_hold_is_refused_with_the_limit(app: Any, instances: Any, words: list[str]) -> None:
    answer = post(app, "/predict", {"instances": instances})
    assert answer.status_code == 422 and all(word in answer.json()["detail"] for word in words)
