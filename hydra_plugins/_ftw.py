"""Where Hydra finds the sweeper of FTW: it builds plugins from this namespace alone.

The underscore keeps the file out of Hydra's search, which would import it into every program that uses Hydra; FTW
registers it by hand (`ftw.cli._sweeper.register_sweeper`).
"""

from ftw.cli import _sweeper


class OptunaSweeper(_sweeper.OptunaSweeper):
    """`hydra/sweeper: optuna`."""
