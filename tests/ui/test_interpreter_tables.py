"""The table of figures: nothing is cut off in a terminal of 80 columns."""

import numpy as np
from rich.console import Console

from ftw.map.interpreter_figures import SYSTEM, figures
from ftw.map.training.interpreter_baselines import WHITENED
from ftw.ui.interpreter import figures_table


def test_all_columns_fit_into_80() -> None:
    random = np.random.default_rng(0)
    said = {name: random.dirichlet(np.ones(9), 40) for name in (SYSTEM, "linear softmax", WHITENED)}
    found = figures(said, random.integers(0, 9, 40), ["named", "unnamed"] * 20, draws=50)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(figures_table(found))
    assert "…" not in shown.get()
    assert WHITENED in shown.get()
