"""Sentences around a concept: everyday ones with a gap, and requests for a substrate to write its own.

The sentences differ in register (news, diary, talk, manual, letter, review) and in where the gap stands, and their own
words are kept general, so that nothing but what fills the gap tells what they are about.
"""

import re

from ftw.map.wikipedia import cut
from ftw.map.wordnet import Synset, WordNet

CONTEXTS = (
    "We talked about {} for most of the evening.",
    "{} was mentioned twice in yesterday's report.",
    "Could you tell me more about {}?",
    "I have been reading about {} all week, and I still have questions.",
    "Nothing in the introduction had prepared us for {}.",
    "For homework, each of us had to describe {} in a few lines.",
    "When I think of {}, I remember that summer.",
    "The second chapter deals with {} in some detail.",
    "She had never seen {} before, except in pictures.",
    "There is a short note on {} at the bottom of the page.",
    "Most visitors come because of {}.",
    "He closed his talk with a remark about {}.",
    "What surprised me most was how little was known about {}.",
    "Dear Anna, thank you for the postcard with {} on it!",
    "According to this morning's news, interest in {} has been growing.",
    "{} is the answer to the last question of the quiz.",
    "If you want to understand {}, begin with the basics.",
    "They could not agree on whether {} should be on the list.",
    "Three out of five people recognised {} at once.",
    "In the old photograph, {} can be seen on the left.",
    "My notes on {} got wet, so here is what I remember.",
    "A whole page of the catalogue is given to {}.",
    "Please do not forget to add {} before you send it.",
    "It was late, and the conversation had turned to {}.",
    "As far as I can tell, {} has little to do with it.",
    "The documentary devotes ten minutes to {}, which is far too short.",
    "Reviewers praised the passage about {} and ignored the rest.",
    "Once you have learned to notice {}, you see the signs everywhere.",
)

# Never learnt from: whether a lens or an interpreter knows a concept in sentences it has not met is asked with these.
TEST_CONTEXTS = (
    "My grandfather used to say a few words about {} before dinner.",
    "On the way home we passed a poster of {}.",
    "Is there anything you would like to know about {}?",
    "A reader from Leeds writes to us about {}.",
    "{} turned up in conversation again last night.",
    "Chapter nine opens with a drawing of {}.",
    "I cannot explain why, but {} came to my mind at once.",
    "Only one of the speakers had ever heard of {}.",
    "Our guide stopped and said something about {}.",
    "It took the class a whole morning to find out what {} was.",
    "Nobody at the table expected a question on {}.",
    "The label on the box says {} in small letters.",
    "Everything in the room reminded her of {}.",
    "You will find {} under the letter of the alphabet it begins with.",
)

# For concepts that are confused with others: the gap holds the one that is meant.
OPPOSITIONS = (
    "It was {}, and certainly not {other}, that we were looking for.",
    "Do not mistake {0} for {other}: what we mean here is {0}.",
    "Unlike {other}, {} is what this page is about.",
    "He said {other}, but then he corrected himself: {}.",
    "The question was about {}; those who wrote about {other} got no points.",
    "What sets {0} apart from {other}? Think of {0} alone.",
    "This is {}. It is not {other}.",
    "Forget {other} for a moment and picture {}.",
)

# What a substrate is asked to write of a concept; no definition is in it, since readers are tested on definitions.
WRITING_PROMPTS = (
    "Write two sentences about {thing}.",
    "Begin an encyclopedia entry about {thing}. Two sentences.",
    "In two plain sentences, explain to a child what {thing} is.",
    "Write the first two sentences of a news story in which {thing} plays the main part.",
    "Write two sentences of a travel diary that mention {thing}.",
    "State two facts about {thing}.",
)
CONTRAST_PROMPTS = (
    "State two facts about {thing} that are not true of {other}.",
    "In two sentences, say what {thing} is, so that nobody takes it for {other}.",
)

GENERATION_PROMPTS = (
    "Write two sentences about {thing}, meaning: {definition}.",
    "Begin an encyclopedia entry about {thing} ({definition}). Two sentences.",
    "In two plain sentences, explain to a child what {thing} is: {definition}.",
    "Write the first two sentences of a news story in which {thing} ({definition}) plays the main part.",
    "Write two sentences of a travel diary that mention {thing}, that is, {definition}.",
    "State two facts about {thing}, in the sense of {definition}.",
)

_REFUSAL = re.compile(r"^(i'm sorry|i am sorry|i apologi[sz]e|as an ai|i cannot|i can't)\b", re.IGNORECASE)
_OPENING = re.compile(
    r"^(sure|certainly|of course|here (is|are)|here's|two (facts|sentences))\b[^:\n]{0,120}[:!]\s*", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?:^|(?<=\s))\d{1,2}\.(?:\s+|$)")
MIN_WRITTEN_CHARACTERS = 30


def phrase(wordnet: WordNet, synset: str) -> str:
    """How a sentence calls a synset: a name as it stands, a common noun with its article."""
    found = wordnet.synset(synset)
    return with_article(familiar_lemma(wordnet, found), found.pos)


def familiar_lemma(wordnet: WordNet, synset: Synset) -> str:
    """The first lemma whose most frequent sense the synset is, as readers take words in that sense; else the first."""
    owned = (lemma for lemma in synset.lemmas if is_first_sense(wordnet, lemma, synset))
    return next(owned, synset.lemmas[0])


def is_first_sense(wordnet: WordNet, lemma: str, synset: Synset) -> bool:
    """Whether the synset is the most frequent sense of a lemma."""
    return wordnet.senses(lemma, synset.pos)[:1] == [synset.name]


def with_article(lemma: str, pos: str = "n") -> str:
    """A lemma as it stands in a sentence.

    Names end in a capital word (Lake Erie); things called after names do not (Chinese alligator).
    """
    bare = pos != "n" or lemma.split()[-1][:1].isupper()
    return lemma if bare else f"the {lemma}"


def written(reply: str, max_characters: int) -> str:
    """What of a substrate's reply is text about the thing: no preamble, no half sentence; "" if nothing is left."""
    text = _LIST_NUMBER.sub("", _OPENING.sub("", reply.strip()))
    text = re.sub(r"\s+", " ", text).strip().strip('"')
    # Generation ends at its limit; half a sentence would teach where the limit was.
    ends = [match.end() for match in re.finditer(r"[.!?]['\"”’)]*(?=\s|$)", text)]
    text = text[: ends[-1]] if ends else ""
    return "" if len(text) < MIN_WRITTEN_CHARACTERS or _REFUSAL.match(text) else cut(text, max_characters)
