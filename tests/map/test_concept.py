"""Concept packs: what a round trip keeps, what the hierarchy answers, and what hostile files meet."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ftw.errors import ConceptError
from ftw.map.concept import Concept, ConceptPack

FIRST_LIGHT = Path(__file__).parents[2].parent / "shared" / "data" / "first-light"


def record(name: str, layer: int, *parents: str, **more: object) -> dict[str, Any]:
    return {"sumo_term": name, "layer": layer, "parent_concepts": list(parents), "definition": f"a {name}", **more}


RECORDS = [
    record("Thing", 0, category_children=["Nonsense"], safety_tags={"risk_level": "low"}),
    record("Idea", 0),
    record("Living Being", 1, "Thing"),
    record("Artefact", 1, "Idea", "Thing"),  # the tree below says Thing
    record("Dog", 2, "Living Being", lemmas=["dog"], synsets=["dog.n.01"], relationships={"antonyms": ["Cat", "God"]}),
    record("Cat", 2, "Living Being", "Artefact"),
    record("cat", 2, "Artefact"),
]
TREE = {
    "child_to_parent": {
        "Living Being:1": "Thing:0",
        "Artefact:1": ["Thing:0"],  # older packs write a list
        "Dog:2": "Living Being:1",
        "Cat:2": "Living Being:1",
        "cat:2": "Artefact:1",
    },
    "steering_targets": {"Dog:2": {"target": "Cat:2", "rationale": "why not"}},
}


def write(folder: Path, records: list[Any], tree: Any = None, **info: object) -> Path:
    """Write the files of a pack, fit or unfit."""
    (folder / "hierarchy").mkdir(parents=True, exist_ok=True)
    (folder / "pack.json").write_text(json.dumps({"pack_id": "toy", "version": "1.2.3", "meld_policy": {}, **info}))
    if tree is not None:
        (folder / "hierarchy.json").write_text(json.dumps(tree))
    for layer in {row["layer"] for row in records if isinstance(row, dict)}:
        rows = [row for row in records if not isinstance(row, dict) or row["layer"] == layer]
        content = {"layer": layer, "concepts": rows, "metadata": {"description": "as found"}}
        (folder / "hierarchy" / f"layer{int(layer)}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write(tmp_path / "toy", RECORDS, TREE)
    (folder / "concepts").mkdir()
    (folder / "concepts" / "dog.json").write_text('{"term": "Dog", "role": "concept"}')
    (folder / "LICENSE").write_text("CC0")
    return folder


@pytest.fixture
def pack(folder: Path) -> ConceptPack:
    return ConceptPack.load(folder)


def assert_same_json(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*.json"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.json"))
    for name in names:
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name


def assert_hierarchy_is_sound(pack: ConceptPack) -> None:
    """Every relation agrees with the parents, computed here in the plainest way."""
    above: dict[str, set[str]] = {}
    for name in pack.names:
        waiting, above[name] = list(pack[name].parents), set()
        while waiting:
            if (parent := waiting.pop()) not in above[name]:
                above[name].add(parent)
                waiting += pack[parent].parents
    below: dict[str, set[str]] = {name: set() for name in pack.names}
    for name, ancestors in above.items():
        assert pack.ancestors(name) == ancestors
        for ancestor in ancestors:
            below[ancestor].add(name)
    assert all(pack.descendants(name) == below[name] for name in pack.names)
    in_tree = [child for name in pack.names for child in pack.tree_children(name)]
    assert sorted(in_tree + pack.roots) == sorted(pack.names)


def test_loading_and_saving_loses_nothing(folder: Path, pack: ConceptPack, tmp_path: Path) -> None:
    pack.save(tmp_path / "copy")
    assert ConceptPack.load(tmp_path / "copy") == pack
    assert_same_json(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "LICENSE").read_text() == "CC0"
    pack.save(folder)  # over itself
    assert ConceptPack.load(folder) == pack


def test_saving_never_wipes_a_folder_of_something_else(pack: ConceptPack, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(ConceptError, match=r"chapter\.tex"):
        pack.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def test_the_tree_is_trusted_before_the_records(pack: ConceptPack) -> None:
    assert pack.parents("Artefact") == ["Thing", "Idea"]
    assert pack.path("cat") == ["Thing", "Artefact", "cat"]
    assert pack.tree_children("Thing") == ["Living Being", "Artefact"]
    assert pack.children("Artefact") == ["cat", "Cat"]


def test_relations_follow_all_parents(pack: ConceptPack) -> None:
    assert_hierarchy_is_sound(pack)
    assert pack.ancestors("Cat") == {"Living Being", "Artefact", "Thing", "Idea"}
    assert pack.descendants("Idea") == {"Artefact", "Cat", "cat"}
    assert pack.siblings("Dog") == ["Cat"]
    assert pack.siblings("Thing") == ["Idea"]
    assert pack.antonyms("Dog") == ["Cat"]


def test_names_come_by_level_and_then_as_given(pack: ConceptPack) -> None:
    assert pack.names == ["Thing", "Idea", "Living Being", "Artefact", "Dog", "Cat", "cat"]
    assert pack.levels == {0: ["Thing", "Idea"], 1: ["Living Being", "Artefact"], 2: ["Dog", "Cat", "cat"]}


def test_a_pack_without_a_tree_takes_the_first_listed_parent(tmp_path: Path) -> None:
    pack = ConceptPack.load(write(tmp_path / "toy", RECORDS))
    assert pack.parents("Artefact") == ["Idea", "Thing"]
    pack.save(tmp_path / "copy")
    assert ConceptPack.load(tmp_path / "copy") == pack


def test_namesakes_of_several_levels_are_told_apart(tmp_path: Path) -> None:
    rows = [record("Root", 0), record("Law", 1, "Root"), record("Law", 2, "Law"), record("Court", 3, "Law")]
    pack = ConceptPack.load(write(tmp_path / "toy", rows))
    assert pack.names == ["Root", "Law:1", "Law:2", "Court"]
    assert pack.path("Court") == ["Root", "Law:1", "Law:2", "Court"]
    part = pack.subset(["Law:2", "Court"])
    part.save(tmp_path / "part")
    assert ConceptPack.load(tmp_path / "part") == part
    assert part.names == ["Law:2", "Court"]


def test_a_name_that_only_looks_like_a_key_is_left_alone(tmp_path: Path) -> None:
    pack = ConceptPack.load(write(tmp_path / "toy", [record("Root", 0), record("Blade:1", 1, "Root")]))
    pack.save(tmp_path / "copy")
    assert pack.names == ["Root", "Blade:1"]
    assert ConceptPack.load(tmp_path / "copy") == pack


def test_a_concept_made_in_code_survives_the_folder(tmp_path: Path) -> None:
    concepts = [Concept(name="a", level=0), Concept(name="b", level=1, parents=["a"], definition="b", lemmas=["bee"])]
    pack = ConceptPack.of("mine", "0.1.0", concepts, {})
    pack.save(tmp_path / "mine")
    assert ConceptPack.load(tmp_path / "mine") == pack
    assert pack.info["concept_metadata"]["layer_distribution"] == {"0": 1, "1": 1}
    with pytest.raises(ConceptError, match="twice"):
        ConceptPack.of("mine", "0.1.0", [*concepts, concepts[0]], {})


def test_a_subset_hangs_each_concept_below_its_nearest_kept_ancestor(pack: ConceptPack, tmp_path: Path) -> None:
    part = pack.subset(["Thing", "Idea", "Cat", "Dog"])
    assert part.parents("Cat") == ["Thing", "Idea"]
    assert part.parents("Dog") == ["Thing"]
    for size in range(1, len(pack)):
        for kept in itertools.combinations(pack.names, size):
            part = pack.subset(kept)
            assert all(part.ancestors(name) == pack.ancestors(name) & set(kept) for name in kept)
    assert pack.subset(levels=[1, 2]).names == ["Living Being", "Artefact", "Dog", "Cat", "cat"]
    assert pack.subset(pack.names) == pack
    part.save(tmp_path / "part")
    assert ConceptPack.load(tmp_path / "part") == part
    with pytest.raises(ConceptError, match="no level 9"):
        pack.subset(levels=[9])
    with pytest.raises(ConceptError, match=r"'Dgo'.*Dog"):
        pack.subset(["Dgo"])


def test_the_hash_is_of_what_the_pack_means(folder: Path, pack: ConceptPack, tmp_path: Path) -> None:
    same = write(tmp_path / "same", RECORDS, TREE, description="another word about it")
    assert ConceptPack.load(same).content_hash() == pack.content_hash()
    for change in ({"definition": "else"}, {"parent_concepts": ["Living Being", "Idea"]}, {"synsets": ["dog.n.02"]}):
        other = write(
            tmp_path / str(change), [{**row, **change} if row["sumo_term"] == "Dog" else row for row in RECORDS]
        )
        base = write(tmp_path / "base", RECORDS)
        assert ConceptPack.load(other).content_hash() != ConceptPack.load(base).content_hash()


def test_an_unknown_name_is_met_with_the_nearest_whatever_the_case(pack: ConceptPack) -> None:
    with pytest.raises(ConceptError, match=r"'CAT'.*nearest: Cat, cat"):
        pack.ancestors("CAT")
    assert pack.closest("living beeing") == ["Living Being"]


def test_gaps_are_reported_not_refused(tmp_path: Path) -> None:
    rows = [record("Root", 0), record("Mute", 2, "Root", definition=None), record("Low", 1, "Root", "Mute")]
    pack = ConceptPack.load(write(tmp_path / "toy", rows, concept_metadata={"total_concepts": 7}))
    problems = "\n".join(pack.verify())
    assert "1 of 3 concepts have no definition" in problems
    assert "1 further parents are not of a lower level" in problems
    assert "pack.json states 7 concepts" in problems


def test_summary_and_tree_read_like_a_table_of_contents(pack: ConceptPack) -> None:
    assert pack.summary().splitlines() == [
        "toy 1.2.3: 7 concepts, 2 roots, 4 leaves",
        "  level 0: 2",
        "  level 1: 2",
        "  level 2: 3",
    ]
    assert pack.tree() == ["Thing", "  Living Being", "    Dog", "    Cat", "  Artefact", "    cat", "Idea"]
    assert pack.tree(1) == ["Thing", "  Living Being  (2 below)", "  Artefact  (2 below)", "Idea"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([record("../../etc/passwd", 0)], r"layer0\.json: concept '\.\./\.\./etc/passwd'.*path separator"),
        ([record("a\\b", 0)], "path separator"),
        ([record("..", 0)], "empty or a dot"),
        ([record("", 0)], "empty or a dot"),
        ([record("a\x00b", 0)], "cannot be printed"),
        ([record("a\ud800", 0)], "cannot be printed"),
        ([record("x" * 5000, 0)], "5000 characters"),
        ([record("A", 0), record("A", 0)], "holds concept 'A' twice"),
        (
            [record("A", 0), record("B", 1, "Ghost")],
            r"'B' in hierarchy/layer1\.json: its parent 'Ghost' does not exist",
        ),
        ([record("A", 0, "B"), record("B", 0, "A")], "concept 'A'.*cycle"),
        ([record("A", 0, "A")], "concept 'A'.*cycle"),
        ([record("A", 0), "not a record"], r"layer0\.json: a concept must be an object"),
        ([{"layer": 0, "parent_concepts": []}], r"layer0\.json: a concept without a name"),
        ([record("A", 0), {**record("B", 0), "sumo_term": 7}], "sumo_term is 7"),
        ([record("A", 0, synsets={"x": 1})], r"layer0\.json: concept 'A': its synsets must be a list"),
        ([record("A", 0, lemmas=[1, 2])], "concept 'A': its lemmas"),
        ([{**record("A", 0), "parent_concepts": 5}], "concept 'A': its parent_concepts"),
        ([{**record("A", 0), "definition": ["x"]}], "concept 'A': its definition must be text"),
        ([{**record("A", 0), "layer": True}], "concept 'A': its layer is True"),
    ],
)
def test_a_hostile_record_is_refused_by_name_and_file(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(ConceptError, match=words):
        ConceptPack.load(write(tmp_path / "toy", rows))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("hierarchy.json", "[" * 200_000, r"hierarchy\.json is nested too deeply"),
        ("hierarchy.json", "[]", r"hierarchy\.json must hold a JSON object"),
        ("hierarchy.json", '{"child_to_parent": 3}', "child_to_parent must map"),
        ("hierarchy.json", '{"child_to_parent": {"Dog:2": 3}}', "parent of concept 'Dog:2'"),
        ("hierarchy.json", '{"child_to_parent": {"Ghost:2": "Thing:0"}}', "'Ghost:2' stands in the tree"),
        ("hierarchy.json", '{"child_to_parent": {"Thing:0": "Dog:2"}}', "cycle"),
        ("hierarchy/layer1.json", '{"layer": 1, "conc', r"cannot read .*layer1\.json"),
        ("hierarchy/layer1.json", '{"layer": 1}', r"layer1\.json: 'concepts' must be a list"),
        ("hierarchy/layer9999.json", '{"concepts": []}', "beyond 1000"),
        ("pack.json", '{"pack_id": NaN}', "NaN is not JSON"),
        ("pack.json", '{"pack_id": 5}', "pack_id must be text"),
        ("pack.json", '{"pack_id": ' + "9" * 5000 + "}", r"cannot read .*pack\.json"),
    ],
)
def test_a_hostile_file_is_refused_by_name(folder: Path, name: str, content: str, words: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConceptError, match=words):
        ConceptPack.load(folder)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "pack.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptError, match=r"cannot read .*pack\.json"):
        ConceptPack.load(folder)


def test_a_folder_without_a_pack_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=r"no pack\.json"):
        ConceptPack.load(tmp_path)
    (tmp_path / "pack.json").write_text("{}")
    with pytest.raises(ConceptError, match=r"hierarchy/layer0\.json"):
        ConceptPack.load(tmp_path)


def test_a_carried_file_cannot_leave_the_folder(pack: ConceptPack, tmp_path: Path) -> None:
    pack.files.carried["../outside.json"] = b"{}"
    with pytest.raises(ConceptError, match="leads out of the folder"):
        pack.save(tmp_path / "copy")
    assert not (tmp_path / "outside.json").exists()


def test_contradictions_can_be_listed_without_refusing(tmp_path: Path) -> None:
    rows = [record("A", 0, "B"), record("B", 0, "A"), record("C", 1, "Ghost"), record("D", 1, "A")]
    pack = ConceptPack.load(write(tmp_path / "toy", rows), strict=False)
    assert [problem.split(":")[0] for problem in pack.contradictions()] == [
        "concept 'A' in hierarchy/layer0.json",
        "concept 'B' in hierarchy/layer0.json",
        "concept 'C' in hierarchy/layer1.json",
    ]
    assert pack.path("D")[-2:] == ["A", "D"]  # a cycle ends the walk
    assert pack.ancestors("D") == {"A", "B"}


def test_a_chain_of_thousands_needs_no_recursion() -> None:
    concepts = [Concept(name=f"c{i}", level=i, parents=[f"c{i - 1}"] if i else []) for i in range(1001)]
    pack = ConceptPack.of("chain", "1.0.0", concepts, {})
    assert len(pack.ancestors("c1000")) == len(pack.descendants("c0")) == 1000
    assert len(pack.path("c1000")) == 1001


@pytest.mark.skipif(not (FIRST_LIGHT / "pack.json").is_file(), reason="First Light is not beside this checkout")
def test_first_light_is_read_whole_and_written_without_loss(tmp_path: Path) -> None:
    pack = ConceptPack.load(FIRST_LIGHT)
    assert len(pack) == 7_947
    assert {level: len(names) for level, names in pack.levels.items()} == {
        0: 5,
        1: 23,
        2: 241,
        3: 1_283,
        4: 2_603,
        5: 2_687,
        6: 1_105,
    }
    assert sum(not pack.tree_children(name) for name in pack.names) == 6_708
    tree = json.loads((FIRST_LIGHT / "hierarchy.json").read_text())["child_to_parent"]
    assert {child.rsplit(":", 1)[0]: parent.rsplit(":", 1)[0] for child, parent in tree.items()} == {
        name: pack.parents(name)[0] for name in pack.names if pack.parents(name)
    }
    assert {"BasketBall", "Basketball"} <= set(pack.names)
    assert pack.contradictions() == []
    pack.save(tmp_path / "copy")
    assert ConceptPack.load(tmp_path / "copy") == pack
    assert_same_json(FIRST_LIGHT, tmp_path / "copy")
    assert_hierarchy_is_sound(pack)
