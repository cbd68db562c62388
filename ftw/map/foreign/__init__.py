"""Packs of other programs: read into FTW's form, and written in theirs."""
