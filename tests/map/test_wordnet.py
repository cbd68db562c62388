"""WordNet files of a dozen synsets, written here in Princeton's grammar, and (slow) the real ones."""

from pathlib import Path

import pytest

from ftw.errors import ConceptError, ConfigError, SourceError
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig, build_pack, choose, load_concepts
from ftw.map.sentences import familiar_lemma
from ftw.map.wordnet import WordNet, split_gloss

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 Princeton  \n"

# key: (lexicographer file, lemmas, {pointer symbol: keys}, gloss)
NOUNS = {
    "entity": ("03", ["entity"], {"~": ["animal", "food", "heat", "cold"]}, "that which exists  "),
    "animal": (
        "05",
        ["animal", "beast"],
        {"@": ["entity"], "~": ["dog", "cat", "pet"]},
        'it moves; "an animal"; "so be it"',
    ),
    "dog": ("05", ["dog", "Canis_familiaris"], {"@": ["animal", "pet"], "~i": ["Rex"]}, 'a "canine" animal'),
    "cat": ("05", ["cat"], {"@": ["animal"]}, "it meows"),
    "pet": ("05", ["pet"], {"@": ["animal"], "~": ["dog"]}, "kept at home"),
    "Rex": ("18", ["Rex"], {"@i": ["dog"]}, "a dog of the pharaohs; (1900-1910)"),
    "food": ("13", ["food"], {"@": ["entity"], "~": ["hot dog"]}, "it is eaten"),
    "hot dog": ("13", ["hot_dog", "dog"], {"@": ["food"]}, "a sausage"),
    "heat": ("19", ["heat"], {"@": ["entity"], "!": ["cold"]}, "high temperature"),
    "cold": ("19", ["cold", "input/output"], {"@": ["entity"], "!": ["heat"]}, "low temperature"),
}
SENSES = {"dog": ["dog", "hot dog"]}  # the order of a word's senses is that of the index


def write_part(folder: Path, word: str, pos: str, synsets: dict) -> None:
    """Write data.* and index.* of a part of speech; the offsets are found by writing twice."""
    offsets, text = dict.fromkeys(synsets, 0), ""
    for _ in range(2):
        text = LICENCE
        for key, (lexfile, lemmas, links, gloss) in synsets.items():
            offsets[key] = len(text)
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            pairs = [(symbol, target) for symbol, targets in links.items() for target in targets]
            pointers = "".join(f"{symbol} {offsets[target]:08d} {pos} 0000 " for symbol, target in pairs)
            head = f"{offsets[key]:08d} {lexfile} {pos} {len(lemmas):02x} {words} {len(pairs):03d} "
            text += f"{head}{pointers}| {gloss}  \n"
    (folder / f"data.{word}").write_text(text)
    lemmas = {lemma.lower() for _, words, _, _ in synsets.values() for lemma in words}
    index = LICENCE
    for lemma in sorted(lemmas):
        keys = SENSES.get(lemma) or [key for key, row in synsets.items() if lemma in map(str.lower, row[1])]
        places = " ".join(f"{offsets[key]:08d}" for key in keys)
        index += f"{lemma} {pos} {len(keys)} 1 @ {len(keys)} 0 {places}  \n"
    (folder / f"index.{word}").write_text(index)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "package" / "3.0"
    inner.mkdir(parents=True)
    write_part(inner, "noun", "n", NOUNS)
    write_part(inner, "adj", "a", {"able": ("00", ["able(p)", "fit_for"], {}, 'having power; "able to swim"')})
    return tmp_path


@pytest.fixture
def wordnet(folder: Path) -> WordNet:
    return WordNet.open(folder)


def test_a_synset_says_all_that_its_line_says(wordnet: WordNet) -> None:
    animal = wordnet.synset("animal.n.01")
    assert animal.lemmas == ("animal", "beast")
    assert animal.definition == "it moves"
    assert animal.examples == ("an animal", "so be it")
    assert (animal.pos, animal.lexname) == ("n", "noun.animal")
    assert animal.hypernyms == ("entity.n.01",)
    assert animal.hyponyms == ("dog.n.01", "cat.n.01", "pet.n.01")
    assert wordnet.synset("heat.n.01").antonyms == ("cold.n.01",)


def test_senses_stand_in_the_order_of_the_index(wordnet: WordNet) -> None:
    assert [synset.name for synset in wordnet.synsets("dog")] == ["dog.n.01", "hot_dog.n.01"]
    assert [synset.name for synset in wordnet.synsets("Hot Dog")] == ["hot_dog.n.01"]
    assert wordnet.synsets("unicorn") == []


def test_a_synset_answers_to_each_of_its_names(wordnet: WordNet) -> None:
    dog = wordnet.synset("dog.n.01")
    for name in ("canis_familiaris.n.01", "Canis familiaris.n.1", f"{dog.offset:08d}.n", f"{dog.offset:08d}-n"):
        assert wordnet.synset(name) is dog
    assert dog.lemmas == ("dog", "Canis familiaris")
    assert wordnet.synset("dog.n.02") is wordnet.synset("hot_dog.n.01")


def test_the_marker_of_an_adjective_is_no_part_of_the_word(folder: Path) -> None:
    text = (folder / "package/3.0/index.adj").read_text()
    (folder / "package/3.0/index.adj").write_text(text.replace("able(p)", "able"))
    assert WordNet.open(folder).synset("able.a.01").lemmas == ("able", "fit for")


def test_ancestors_and_closure_follow_all_paths_and_instances(wordnet: WordNet) -> None:
    assert wordnet.ancestors("rex.n.01") == {"dog.n.01", "pet.n.01", "animal.n.01", "entity.n.01"}
    assert wordnet.closure("dog.n.01") == {"dog.n.01", "rex.n.01"}
    assert wordnet.distances_up("dog.n.01") == {"dog.n.01": 0, "animal.n.01": 1, "pet.n.01": 1, "entity.n.01": 2}
    for name in wordnet.names():
        assert wordnet.closure(name) - {name} >= set(wordnet.synset(name).hyponyms)
        assert name not in wordnet.ancestors(name)


@pytest.mark.parametrize(
    ("gloss", "definition", "examples"),
    [
        ('a thing; "one thing"; "two: things"', "a thing", ("one thing", "two: things")),
        ('the word "set"; also a "group"', 'the word "set"; also a "group"', ()),
        ('a saying; "to be"- Shakespeare', "a saying", ("to be",)),
        ('cut short; "an example without an en', "cut short", ("an example without an en",)),
        ("no example; two parts", "no example; two parts", ()),
    ],
)
def test_a_gloss_splits_where_its_examples_begin(gloss: str, definition: str, examples: tuple[str, ...]) -> None:
    assert split_gloss(gloss) == (definition, examples)


def test_an_unknown_synset_is_met_with_the_nearest(wordnet: WordNet) -> None:
    with pytest.raises(ConceptError, match=r"'animla\.n\.01'.*nearest: animal\.n\.01"):
        wordnet.synset("animla.n.01")
    with pytest.raises(ConceptError, match=r"2 senses: .*a sausage"):
        wordnet.synset("dog.n.03")
    with pytest.raises(ConceptError, match=r"write lemma\.pos\.number"):
        wordnet.synset("dog")
    with pytest.raises(ConceptError, match="part of speech 'x'"):
        wordnet.synsets("dog", "x")


def test_a_folder_without_wordnet_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.noun"):
        WordNet.open(tmp_path)


def test_a_missing_index_is_named(folder: Path) -> None:
    (folder / "package/3.0/index.noun").unlink()
    with pytest.raises(SourceError, match=r"index\.noun"):
        WordNet.open(folder).synset("dog.n.01")


@pytest.mark.parametrize("name", ["data.noun", "index.noun"])
def test_a_file_cut_anywhere_is_refused_with_its_name_and_line(folder: Path, name: str) -> None:
    file = folder / "package/3.0" / name
    whole = file.read_bytes()
    for cut in range(len(LICENCE), len(whole) - 1, 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"(data|index)\.noun.* line \d+"):
            WordNet.open(folder).names()


def test_a_damaged_line_is_named_when_it_is_read(folder: Path) -> None:
    file = folder / "package/3.0/data.noun"
    file.write_text(file.read_text().replace("cat 0 001 @", "cat 0 0x1 @"))
    with pytest.raises(SourceError, match=r"data\.noun, line 6"):
        WordNet.open(folder).synset("cat.n.01")


def pack_of(wordnet: WordNet, *synsets: str, **more: object) -> ConceptPack:
    return build_pack(ConceptsConfig(synsets=list(synsets), **more), wordnet)  # pyright: ignore[reportArgumentType]


def test_the_pack_keeps_the_order_of_what_was_chosen(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, "rex.n.01", "animal.n.01", "hot_dog.n.01", "entity.n.01")
    assert pack.levels == {0: ["entity"], 1: ["animal", "hot dog"], 2: ["Rex"]}
    assert pack.path("Rex") == ["entity", "animal", "Rex"]
    assert pack.siblings("animal") == ["hot dog"]
    assert pack["Rex"].definition == "a dog of the pharaohs; (1900-1910)"
    assert pack.verify() == []


def test_the_tree_parent_is_the_most_specific_one(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, "animal.n.01", "pet.n.01", "dog.n.01")
    assert pack.parents("dog") == ["pet"]
    assert all(pack[parent].level < concept.level for concept in pack.concepts.values() for parent in concept.parents)


def test_shared_words_and_separators_leave_names_unique_and_safe(folder: Path) -> None:
    file = folder / "package/3.0"
    nouns = NOUNS | {"hot dog": ("13", ["dog", "hot_dog"], {"@": ["food"]}, "a sausage")}
    nouns["cold"] = ("19", ["input/output"], {"@": ["entity"], "!": ["heat"]}, "low")
    write_part(file, "noun", "n", nouns)
    pack = pack_of(WordNet.open(folder), "dog.n.01", "dog.n.02", "input/output.n.01", "heat.n.01")
    assert pack.names == ["dog (dog.n.01)", "dog (dog.n.02)", "input-output", "heat"]
    assert pack.antonyms("heat") == ["input-output"]


def test_the_choice_takes_the_largest_closures_within_depth(wordnet: WordNet) -> None:
    def chosen(**bounds: object) -> list[str]:
        return build_pack(ConceptsConfig(roots=["entity.n.01"], **bounds), wordnet).names  # pyright: ignore[reportArgumentType]

    assert chosen(num=2) == ["entity", "animal"]
    assert chosen(num=2, min_depth=1) == ["animal", "pet"]
    assert chosen(num=3, min_depth=1) == ["animal", "pet", "dog"]  # "dog" and "food" tie, the name decides
    assert set(chosen(max_depth=1, min_closure=1)) == {"entity", "animal", "food"}
    assert chosen(num=2, synsets=["cat.n.01"]) == ["entity", "cat"]
    assert chosen(min_closure=1) == chosen(min_closure=1)


TAGS = """animal%1:05:00:: {animal} 1 7
dog%1:05:00:: {dog} 1 42
dog%1:13:00:: {hot} 2 0
able%3:00:00:: 99999999 1 3
"""


@pytest.fixture
def tagged(folder: Path) -> WordNet:
    """WordNet with an index.sense."""
    wordnet = WordNet.open(folder)
    offsets = {word: f"{wordnet.synset(name).offset:08d}" for word, name in (
        ("animal", "animal.n.01"), ("dog", "dog.n.01"), ("hot", "hot_dog.n.01"))}  # fmt: skip
    (wordnet.folder / "index.sense").write_text(TAGS.format(**offsets))
    return wordnet


def test_the_choice_may_go_by_how_often_a_sense_is_met(tagged: WordNet) -> None:
    assert tagged.tag_counts() == {"animal.n.01": 7, "dog.n.01": 42}
    config = ConceptsConfig(roots=["entity.n.01"], num=3, min_closure=0, order="frequency")
    assert [synset.name for synset in choose(config, tagged)] == ["dog.n.01", "animal.n.01", "entity.n.01"]
    with pytest.raises(ConfigError, match="closure or frequency"):
        choose(ConceptsConfig(roots=["entity.n.01"], order="fame"), tagged)


def test_first_senses_leave_out_what_has_no_word_of_its_own(wordnet: WordNet) -> None:
    every, own = (
        {
            synset.name
            for synset in choose(ConceptsConfig(roots=["entity.n.01"], min_closure=0, first_senses=only), wordnet)
        }
        for only in (False, True)
    )
    terms = [familiar_lemma(wordnet, wordnet.synset(name)).lower() for name in own]
    assert own <= every
    assert len(set(terms)) == len(terms)


def test_a_wordnet_without_tag_counts_says_what_is_missing(wordnet: WordNet) -> None:
    with pytest.raises(SourceError, match=r"index\.sense"):
        wordnet.tag_counts()


def test_a_choice_that_cannot_be_is_refused(wordnet: WordNet) -> None:
    with pytest.raises(ConceptError, match="num=99"):
        build_pack(ConceptsConfig(roots=["entity.n.01"], num=99), wordnet)
    with pytest.raises(ConceptError, match="twice"):
        pack_of(wordnet, "dog.n.01", "canis_familiaris.n.01")
    with pytest.raises(ConceptError, match="no concepts"):
        pack_of(wordnet)


def test_a_built_pack_is_read_back_equal(wordnet: WordNet, folder: Path, tmp_path: Path) -> None:
    pack = pack_of(wordnet, "animal.n.01", "dog.n.01", "rex.n.01", "heat.n.01", "cold.n.01")
    pack.save(tmp_path / "pack")
    assert load_concepts(ConceptsConfig(kind="pack", path=str(tmp_path / "pack")), lambda: folder) == pack
    assert load_concepts(ConceptsConfig(synsets=["dog.n.01", "rex.n.01"], levels=[1]), lambda: folder).names == ["Rex"]


def test_a_kind_without_what_it_needs_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"concepts\.path"):
        load_concepts(ConceptsConfig(kind="pack"), lambda: folder)
    with pytest.raises(ConfigError, match="wordnet and pack"):
        load_concepts(ConceptsConfig(kind="worldnet"), lambda: folder)


@pytest.fixture(scope="module")
def real_wordnet() -> WordNet:
    from ftw.substrate.sources import fetch

    return WordNet.open(fetch("wordnet-3.0").folder)


@pytest.mark.slow
def test_wordnet_has_its_published_numbers(real_wordnet: WordNet) -> None:
    synsets = [real_wordnet.synset(name) for pos in "nvar" for name in real_wordnet.names(pos)]
    assert len(synsets) == len({synset.name for synset in synsets}) == 117_659
    assert sum(len(synset.hypernyms) for synset in synsets) == 89_089 + 8_577  # hypernyms and instance hypernyms
    assert abs(sum(len(synset.examples) for synset in synsets) - 48_339) < 100
    assert len(real_wordnet.closure("entity.n.01")) == len(real_wordnet.names()) == 82_115
    assert real_wordnet.synset("dog.n.01").hypernyms == ("canine.n.02", "domestic_animal.n.01")
    assert real_wordnet.synset("02084071.n").lemmas == ("dog", "domestic dog", "Canis familiaris")


@pytest.mark.slow
def test_the_demo_has_its_concepts_on_four_levels(real_wordnet: WordNet) -> None:
    from omegaconf import OmegaConf

    from ftw.paths import conf

    config = OmegaConf.to_object(OmegaConf.merge(ConceptsConfig(), OmegaConf.load(conf() / "concepts" / "demo.yaml")))
    assert isinstance(config, ConceptsConfig)
    pack = build_pack(config, real_wordnet)
    assert 60 <= len(pack) <= 70
    assert len(pack.levels) == 4
    assert pack.path("carnivore") == ["animal", "vertebrate", "mammal", "carnivore"]
    assert pack.verify() == []
