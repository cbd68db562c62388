"""Parts on every core: in order, with the gradients of the caller, one core a thread, and with their errors."""

import pytest
import torch

from ftw.hat.temporal.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts_and_each_thread_has_one_core():
    found = list(side_by_side(lambda part: (part, torch.get_num_threads()), range(7), CPU))
    assert found == [(part, 1) for part in range(7)]
    assert torch.get_num_threads() == 2


def test_gradients_are_kept_as_where_it_was_called():
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert list(side_by_side(modes, range(2), CPU)) == [(True, False)] * 2
    with torch.inference_mode():
        assert list(side_by_side(modes, range(2), CPU)) == [(False, True)] * 2
    with torch.no_grad():
        assert list(side_by_side(modes, range(2), CPU)) == [(False, False)] * 2


def test_an_error_of_a_part_is_raised_where_its_result_is_asked_for():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda part: 1 / part, [1, 0, 2], CPU))


def test_within_a_part_and_with_one_thread_nothing_is_split_again():
    def nested(_: int) -> list[int]:
        return list(side_by_side(lambda _: torch.get_num_threads(), range(2), CPU))

    assert list(side_by_side(nested, range(2), CPU)) == [[1, 1], [1, 1]]
    torch.set_num_threads(1)
    assert list(side_by_side(lambda part: part, range(3), CPU)) == [0, 1, 2]
