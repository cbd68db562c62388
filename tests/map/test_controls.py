"""Claims about controls: each finds what it is for, none finds what is not there, and a lens is held against them."""

import numpy as np
import pytest

from ftw.map import metrics
from ftw.map.controls import NUM_DIRECTIONS, class_gaps, control_scores
from ftw.map.encyclopedia import CaptureSpec, Encyclopedia, ShardStates
from ftw.map.evaluate import EvaluateConfig, evaluate
from ftw.map.samples import SampleTable

CONCEPTS = ["long", "middling", "chance", "state"]
WIDTH = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Encyclopedia:
    """Concepts that are a matter of length, of a middling length, of chance, and of the state of both layers."""
    rng = np.random.default_rng(0)
    num, splits = 400, ["train"] * 240 + ["test"] * 160
    words_S = rng.integers(2, 60, num)
    states_SD = rng.normal(size=(num, WIDTH))
    labels_SN = np.stack(
        [words_S > 30, (words_S > 12) & (words_S < 36), rng.random(num) < 0.5, states_SD.sum(axis=1) > 0], axis=1
    )
    rows, cols = np.indices(labels_SN.shape)
    texts = [f"{number} " + "word " * count for number, count in enumerate(words_S)]
    table = SampleTable(
        texts=texts,
        groups=texts,
        splits=splits,
        sources=["given"] * num,
        concepts=CONCEPTS,
        rows=rows.reshape(-1),
        cols=cols.reshape(-1),
        labels=labels_SN.reshape(-1).astype(np.int8),
        weights=rng.choice([1.0, 3.0], labels_SN.size).astype(np.float32),
    )
    spec = CaptureSpec(
        substrate_name="toy", fingerprint="0" * 64, layers=(0, 2), width=WIDTH, pools=("mean",), shard_texts=num
    )
    made = Encyclopedia.create(tmp_path_factory.mktemp("controls") / "store", table, spec)
    pooled = {0: rng.normal(size=states_SD.shape).astype(np.float16), 2: states_SD.astype(np.float16)}
    made.write_shard(0, ShardStates(num_tokens=words_S.clip(max=15), pooled={"mean": pooled}))
    return made


def areas(store: Encyclopedia, layers: tuple[int, ...] = (2,)) -> dict[str, dict[str, float]]:
    rows = store.table.where("test")
    labels_SN, weights_SN = store.table.matrices(rows)
    scores = control_scores(store, rows, layers=layers)
    return {
        name: dict(zip(CONCEPTS, metrics.auroc(said_SN, labels_SN, weights_SN).tolist(), strict=True))
        for name, said_SN in scores.items()
    }


def test_length_is_found_where_it_tells_and_also_where_only_a_middling_length_does(store: Encyclopedia):
    length = areas(store)["length"]
    assert length["long"] > 0.98
    assert length["middling"] > 0.95
    assert abs(length["chance"] - 0.5) < 0.12
    assert abs(length["state"] - 0.5) < 0.12


def test_position_knows_the_tokens_that_were_read_and_not_those_that_were_cut(store: Encyclopedia):
    position = areas(store)["position"]
    assert position["long"] < areas(store)["length"]["long"] - 0.2  # all of more than 15 tokens look alike
    assert position["middling"] > 0.6
    assert abs(position["chance"] - 0.5) < 0.12


def test_a_random_direction_is_turned_to_the_side_that_training_says_and_stays_weak(store: Encyclopedia):
    random = areas(store)["random"]
    assert 0.5 < random["state"] < 0.9
    assert abs(random["chance"] - 0.5) < 0.12


def test_the_first_layer_is_read_where_it_was_kept_and_is_no_control_of_itself(store: Encyclopedia):
    first = areas(store)["first_layer"]
    assert abs(first["state"] - 0.5) < 0.15  # layer 0 of this store knows nothing
    assert "first_layer" not in areas(store, layers=(0,))


def test_class_gaps_are_weighted_means_of_positives_minus_negatives(store: Encyclopedia):
    train = store.table.where("train")
    features_SF = np.random.default_rng(1).normal(size=(len(train), NUM_DIRECTIONS))
    labels_SN, weights_SN = store.table.matrices(train)
    for column in range(len(CONCEPTS)):
        high, low = (
            np.average(features_SF, axis=0, weights=weights_SN[:, column] * (labels_SN[:, column] == label))
            for label in (1, 0)
        )
        assert np.allclose(class_gaps(store.table, train, features_SF)[column], high - low, atol=1e-6)


def test_a_lens_that_reads_length_is_marked_and_one_that_reads_states_is_not(store: Encyclopedia):
    rows = store.table.where("test")
    labels_SN, weights_SN = store.table.matrices(rows)
    scores = control_scores(store, rows, layers=(2,))
    rng = np.random.default_rng(2)
    lens_SN = np.stack(
        [scores["length"][:, 0], rng.normal(size=len(rows)), rng.normal(size=len(rows)), 3.0 * labels_SN[:, 3]], axis=1
    )
    found = evaluate(
        {"activation": lens_SN, **scores},
        labels=labels_SN,
        weights=weights_SN,
        groups=[store.table.groups[row] for row in rows],
        concepts=CONCEPTS,
        config=EvaluateConfig(draws=100),
    )
    assert "length" in found.concepts["long"]["no_better_than"]
    assert {"length", "position", "random"} <= set(found.concepts["middling"]["no_better_than"])
    assert found.concepts["state"]["no_better_than"] == []
    assert "difference_length" not in found.mean  # unpaired: no draws are spent on it
    assert "difference_first_layer" in found.mean
