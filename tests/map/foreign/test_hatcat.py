"""A pack of HatCat reads in FTW as its modules do, whatever its spelling; nothing in it is run."""

import io
import json
import pickle  # noqa: TID251 (to write what must not be read)
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hatcat_pack import SPELLINGS, WIDTH, module, state_of, write_info, write_lens
from toy_pack import make_pack

from ftw.errors import FTWError, PackError
from ftw.hat.bank import normalise
from ftw.map.foreign.hatcat_read import read_hatcat
from ftw.map.foreign.hatcat_write import write_hatcat
from ftw.map.foreign.names import concept_name, file_names
from ftw.map.pack import load_pack

NAMES = ["Cat", "Non Profit", "Basket-Ball"]


def expected(network: torch.nn.Module, states_BD: torch.Tensor) -> torch.Tensor:
    """Logits of the ancestor: a lens with a norm of its own reads raw states, any other layer-normed ones."""
    with_norm = isinstance(network[0], torch.nn.LayerNorm)  # pyright: ignore[reportIndexIssue]
    return network(states_BD if with_norm else normalise(states_BD))[:, 0].detach()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("place", ["{}.pt", "{}_classifier.pt", "classifiers/{}.pt"])
def test_lenses_of_every_spelling_and_place_read_as_their_modules(tmp_path: Path, spelling: str, place: str):
    write_info(tmp_path, model_layer=15)
    networks = {
        name: write_lens(tmp_path / f"layer{level}" / place.format(name), spelling) for level, name in enumerate(NAMES)
    }
    pack = read_hatcat(tmp_path, fingerprint="f" * 64).pack
    again = load_pack(pack.save(tmp_path / "new"))
    assert again.levels == {name: level for level, name in enumerate(NAMES)}
    assert (again.recipe.layers, again.recipe.substrate) == ([15], "apertus-8b")
    states_BD = 3 * torch.randn(32, WIDTH) + 1
    logits_BN = again.bank()(states_BD[:, None])
    for column, name in enumerate(again.names):
        assert (logits_BN[:, column] - expected(networks[name], states_BD)).abs().max() < 2e-6


def test_lenses_with_and_without_a_norm_stand_in_one_bank(tmp_path: Path):
    write_info(tmp_path)
    networks = [write_lens(tmp_path / "layer0" / f"{name}.pt", kind) for name, kind in (("A", "norm"), ("B", "old"))]
    pack = read_hatcat(tmp_path, layer=3).pack
    states_BD = torch.randn(8, WIDTH)
    logits_BN = pack.bank()(states_BD[:, None])
    for column, network in enumerate(networks):
        assert (logits_BN[:, column] - expected(network, states_BD)).abs().max() < 2e-6
    with pytest.raises(PackError, match="layer=15"):
        read_hatcat(tmp_path)


def test_banks_fill_what_single_files_leave_out(tmp_path: Path):
    write_info(tmp_path, model_layer=2)
    write_lens(tmp_path / "individual" / "layer1" / "Cat.pt", "plain")
    bank = {name: state_of(module("plain"), "plain") for name in ("Cat", "Dog")}
    (tmp_path / "banks" / "layer1").mkdir(parents=True)
    torch.save(bank, tmp_path / "banks" / "layer1" / "Animal.bank.pt")
    index = {"Animal:0": {"bank_path": "banks/layer1/Animal.bank.pt", "concepts": ["Cat", "Dog"]}}
    (tmp_path / "bank_index.json").write_text(json.dumps(index))
    assert read_hatcat(tmp_path).pack.levels == {"Cat": 1, "Dog": 1}
    index["Animal:0"]["bank_path"] = "../../outside.pt"
    (tmp_path / "bank_index.json").write_text(json.dumps(index))
    with pytest.raises(PackError, match="outside the pack"):
        read_hatcat(tmp_path)


def test_several_depths_of_a_concept_are_averaged_over_those_that_it_has(tmp_path: Path):
    write_info(tmp_path)
    networks = {layer: write_lens(tmp_path / "layer0" / f"Cat@L{layer}.pt", "plain") for layer in (4, 9)}
    alone = write_lens(tmp_path / "layer0" / "Dog@L9.pt", "plain")
    found = read_hatcat(tmp_path)
    states_BLD = torch.randn(8, 2, WIDTH)
    logits_BN = found.pack.bank()(states_BLD)
    both = [expected(networks[layer], states_BLD[:, place]) for place, layer in enumerate((4, 9))]
    assert (logits_BN[:, 0] - (both[0] + both[1]) / 2).abs().max() < 2e-6
    assert (logits_BN[:, 1] - expected(alone, states_BLD[:, 1])).abs().max() < 2e-6


@pytest.mark.parametrize("results", ["list", "dict"])
def test_figures_come_along(tmp_path: Path, results: str):
    write_info(tmp_path, model_layer=4)
    write_lens(tmp_path / "layer0" / "Cat.pt", "plain")
    rows: Any = [{"concept": "Cat", "test_f1": 0.9}]
    (tmp_path / "layer0" / "results.json").write_text(
        json.dumps({"results": rows if results == "list" else {"Cat": {"test_f1": 0.9}}})
    )
    (tmp_path / "calibration.json").write_text(json.dumps({"calibration": {"Cat_L0": {"self_mean": 0.8}}}))
    pack = read_hatcat(tmp_path).pack
    assert pack.metrics["Cat"]["hatcat"]["results"]["test_f1"] == 0.9
    assert pack.metrics["Cat"]["hatcat"]["calibration"] == {"self_mean": 0.8}
    assert not pack.bank().calibrated


def write_percentiles(folder: Path, quantiles: dict[str, Any]) -> None:
    probes = {key: {"model_layer": 4, "quantiles": values} for key, values in quantiles.items()}
    (folder / "probe_calibration.json").write_text(json.dumps({"method": "percentile", "probes": probes}))


def test_percentiles_are_the_rank_among_the_background_that_hatcat_measured(tmp_path: Path):
    write_info(tmp_path, model_layer=4)
    networks = {name: write_lens(tmp_path / "layer0" / f"{name}.pt", "linear") for name in ("Cat", "Dog", "is a")}
    background_TD, states_BD = torch.randn(4000, WIDTH), torch.randn(50, WIDTH)
    logits = {name: expected(network, background_TD).detach() for name, network in networks.items()}
    even = torch.linspace(0, 1, 1001)
    write_percentiles(tmp_path, {f"layer0/{n}": x.sigmoid().quantile(even).tolist() for n, x in logits.items()})
    bank = read_hatcat(tmp_path).pack.bank()
    read_BN = bank(states_BD[:, None])
    percentile_BN = bank.percentile(read_BN)
    for column, name in enumerate(bank.names):
        rank_B = (logits[name] < expected(networks[name], states_BD).detach()[:, None]).float().mean(1)
        assert (percentile_BN[:, column] - rank_B).abs().max() < 0.01


def test_percentiles_that_cannot_be_taken_over_are_left_out_and_said_so(tmp_path: Path):
    write_info(tmp_path)
    for layer in (4, 9):
        write_lens(tmp_path / "layer0" / f"Cat@L{layer}.pt", "plain")
    write_percentiles(tmp_path, {f"layer0/Cat@L{layer}": [0.1, 0.9] for layer in (4, 9)})
    found = read_hatcat(tmp_path)
    assert not found.pack.bank().calibrated
    assert any("several probes" in note for note in found.notes)


@pytest.mark.parametrize("values", [[0.5], [0.9, 0.1], [0.1, 7], ["a", "b"], 3, [float("nan"), 0.5]], ids=str)
def test_hostile_percentiles_are_refused(tmp_path: Path, values: Any):
    write_info(tmp_path, model_layer=4)
    write_lens(tmp_path / "layer0" / "Cat.pt", "plain")
    write_percentiles(tmp_path, {"layer0/Cat": values})
    with pytest.raises(FTWError, match=r"probe_calibration|NaN"):
        read_hatcat(tmp_path)


def test_a_repeated_name_gets_its_level_and_bfloat16_stays_so(tmp_path: Path):
    write_info(tmp_path, model_layer=4)
    for level in (0, 1):
        write_lens(tmp_path / f"layer{level}" / "Cat.pt", "plain", torch.bfloat16)
    pack = read_hatcat(tmp_path).pack
    assert pack.levels == {"Cat:0": 0, "Cat:1": 1}
    assert pack.stored == "bfloat16"


@pytest.mark.parametrize("kind", [{}, {"hidden": 6}, {"rank": 5}, {"hidden": 6, "rank": 5}, {"layers": (3,)}], ids=str)
def test_an_exported_pack_comes_back_with_the_same_logits(tmp_path: Path, kind: dict):
    pack = make_pack(**kind)
    left = write_hatcat(pack, tmp_path / "out")
    assert any("text lenses" in remark for remark in left)
    found = read_hatcat(tmp_path / "out", fingerprint="f" * 64)
    states = torch.randn(16, len(pack.recipe.layers), 32)
    mine, theirs = (one.subset(pack.names).bank() for one in (pack, found.pack))
    assert (mine(states) - theirs(states)).abs().max() < 1e-5
    assert theirs.calibrated == (len(pack.recipe.layers) == 1)
    assert found.pack.levels == pack.levels
    assert found.pack.concepts is not None
    with pytest.raises(PackError, match="not empty"):
        write_hatcat(pack, tmp_path / "out")


def test_names_survive_every_file_system():
    names = [
        *("Basketball", "BasketBall", "basketball", "BASKETBALL", "Non Profit", "a/b", "..", "con", "CON.x", "Straße"),
        *("STRASSE", "strasse", "x.", "y ", " z", "100%", "%42asketBall", 'quo"te', "a:b", "日本", "é", "e\u0301"),
    ]
    stems = file_names(names)
    assert {concept_name(stem): stem for stem in stems.values()} == stems
    assert len({stem.casefold() for stem in stems.values()}) == len(names)
    for stem in stems.values():
        assert not set(stem) & set('/\\:*?"<>|')
        assert stem == stem.strip(" .") != ""


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, ("evil", "w"))


def archive(content: bytes, **further: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, member in {"archive/data.pkl": content, **further}.items():
            file.writestr(name, member)
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HOSTILE = {
    "a plain pickle": pickle.dumps(Evil()),
    "a pickle in an archive": archive(pickle.dumps(Evil())),
    "an object among tensors": saved({"net.0.weight": Evil()}),
    "a bomb": archive(b"0" * 10**6),
    "empty": b"",
    "half a file": saved(state_of(module("plain"), "plain"))[:900],
    "a module": saved(torch.zeros(3)),
    "an expanded tensor": saved({"linear.weight": torch.zeros(1).expand(1, 2**40), "linear.bias": torch.zeros(1)}),
    "other keys": saved({"attention.weight": torch.zeros(2, 2)}),
    "integers": saved({"linear.weight": torch.zeros(1, 3, dtype=torch.int64), "linear.bias": torch.zeros(1)}),
    "nan": saved({"linear.weight": torch.full((1, 3), torch.nan), "linear.bias": torch.zeros(1)}),
    "no bias": saved({"linear.weight": torch.zeros(1, 3)}),
    "shapes that do not fit": saved(
        {f"net.{n}.{k}": torch.zeros(*s) for n in (0, 3, 6) for k, s in (("weight", (4, 5)), ("bias", (4,)))}
    ),
    "a sparse tensor": saved({"linear.weight": torch.eye(3).to_sparse(), "linear.bias": torch.zeros(3)}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_is_run(tmp_path: Path, name: str):
    write_info(tmp_path, model_layer=1)
    (tmp_path / "layer0").mkdir()
    (tmp_path / "layer0" / "Cat.pt").write_bytes(HOSTILE[name])
    with pytest.raises(PackError, match=r"Cat\.pt"):
        read_hatcat(tmp_path)
    assert not Path("evil").exists()


def test_a_link_and_lenses_of_two_forms_are_refused(tmp_path: Path):
    write_info(tmp_path, model_layer=1)
    write_lens(tmp_path / "layer0" / "Cat.pt", "plain")
    (tmp_path / "layer0" / "Dog.pt").symlink_to(tmp_path / "layer0" / "Cat.pt")
    with pytest.raises(PackError, match="link"):
        read_hatcat(tmp_path)
    (tmp_path / "layer0" / "Dog.pt").unlink()
    write_lens(tmp_path / "layer0" / "Dog.pt", "linear")
    with pytest.raises(PackError, match="2 forms"):
        read_hatcat(tmp_path)
