"""An interpreter on a live model reads what it would read of the text alone, and only of its own substrate."""

import pytest
import torch

from ftw.errors import ConceptError, SubstrateError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter, InterpreterConfig, Slot
from ftw.hat.interpreter_reader import InterpretedTokens, interpret_text
from ftw.hat.monitor import Monitor
from ftw.substrate.model import Substrate
from ftw.substrate.taps import read_states

NAMES = [f"c{number}" for number in range(7)]
SLOTS = [Slot(1, "mean"), Slot(3, "mean"), Slot(3, "last"), Slot(2, "token")]


def interpreter(substrate: Substrate, slots: list[Slot] = SLOTS) -> Interpreter:
    torch.manual_seed(3)
    config = InterpreterConfig(width=16, num_blocks=2, num_heads=4, feedforward=32)
    made = Interpreter(
        config,
        names=NAMES,
        slots=slots,
        state_width=substrate.width,
        fingerprint=substrate.fingerprint,
        tree=ConceptTree.of_categories(NAMES, {name: "ab"[number % 2] for number, name in enumerate(NAMES)}),
    )
    torch.nn.init.normal_(made.output.weight)
    return made.eval()


def test_a_text_is_read_by_its_pools_and_tokens(tiny_substrate: Substrate) -> None:
    made = interpreter(tiny_substrate)
    said = interpret_text(made, tiny_substrate, "whales sing", top_k=3)
    ids = tiny_substrate.encode("whales sing")
    ((_, states_LTD),) = read_states(tiny_substrate, [ids], [1, 2, 3], precision="float32")
    normed_LTD = torch.nn.functional.layer_norm(states_LTD, states_LTD.shape[-1:])
    parts = [normed_LTD[0].mean(0)[None], normed_LTD[2].mean(0)[None], normed_LTD[2, -1:], normed_LTD[1]]
    slots_T = torch.tensor([0, 1, 2, *[3] * normed_LTD.shape[1]])
    chance_C = made.probabilities(torch.cat(parts)[None], slots_T=slots_T)[0]
    assert [name for name, _ in said.concepts] == [NAMES[row] for row in chance_C.topk(3).indices]
    assert [chance for _, chance in said.concepts] == pytest.approx(chance_C.topk(3).values.tolist(), abs=2e-2)
    assert sum(chance for _, chance in said.categories) == pytest.approx(1, abs=1e-5)
    assert 0 <= said.confidence <= 1
    assert set(said.record()) == {"confidence", "concepts", "categories"}


def test_each_token_of_an_answer_is_read_with_the_tokens_just_before_it(tiny_substrate: Substrate) -> None:
    made, window = interpreter(tiny_substrate, SLOTS[:3]), 3
    reader = InterpretedTokens(made, top_k=2)
    monitor = Monitor(tiny_substrate, reader, mode="timeline", top_k=7, window=window, stride=1)
    timeline = monitor.generate("whale", max_new_tokens=6, do_sample=False, min_new_tokens=6)
    answer = [place for place, given in enumerate(timeline.is_prompt) if not given]
    assert len(reader.interpretations) == len(answer)
    ids = [int(token) for token in timeline.token_ids]
    ((_, states_LTD),) = read_states(tiny_substrate, [ids], [1, 3], precision="float32")
    normed_LTD = torch.nn.functional.layer_norm(states_LTD, states_LTD.shape[-1:])
    for number, place in enumerate(answer):
        last = place  # position 0 has no state here
        stretch_LTD = normed_LTD[:, max(last - window, answer[0] - 1) : last]
        x_TD = torch.stack([stretch_LTD[0].mean(0), stretch_LTD[1].mean(0), stretch_LTD[1, -1]])
        chance_C = made.probabilities(x_TD[None])[0]
        best = reader.interpretations[number].concepts
        assert [name for name, _ in best] == [NAMES[row] for row in chance_C.topk(2).indices]
        assert [chance for _, chance in best] == pytest.approx(chance_C.topk(2).values.tolist(), abs=1e-4)
        assert timeline.probabilities_TN[place] == pytest.approx(chance_C.tolist(), abs=1e-4)


def test_another_substrate_no_tokens_and_unknown_concepts_are_refused(tiny_substrate: Substrate) -> None:
    made = interpreter(tiny_substrate)
    with pytest.raises(SubstrateError, match="no tokens"):
        interpret_text(made, tiny_substrate, "")
    made.fingerprint = "another"
    with pytest.raises(SubstrateError, match="trained on"):
        interpret_text(made, tiny_substrate, "whale")
    with pytest.raises(ConceptError):
        InterpretedTokens(made).rows_of(["nothing"])
