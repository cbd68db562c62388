"""The growing encyclopedia: states of thousands of concepts, refined in rounds where readers doubt."""

from ftw.map.growing.entries import Entry
from ftw.map.growing.rows import Rows
from ftw.map.growing.store import GrowingEncyclopedia

__all__ = ["Entry", "GrowingEncyclopedia", "Rows"]
