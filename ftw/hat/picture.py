"""A matplotlib figure that belongs to its caller alone and shows itself in a notebook.

pyplot would show figures too, but keeps every one of them alive and picks a backend for the whole process.
"""

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure made without pyplot; a notebook shows it as PNG without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()
