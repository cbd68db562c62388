"""`ftw VERB ...`: hands over to `python -m ftw.cli.VERB` with the arguments untouched.

A process replaced by another keeps `sys.argv` honest: Lightning starts further processes with it, and Hydra reads it.
"""

import difflib
import os
import sys

VERBS = {
    "demo": "the whole way on real input: concepts, states, lenses, figures, a live reading, a report",
    "concepts": "build, show or verify a concept pack",
    "collect": "run the substrate over texts and keep its states in an encyclopedia",
    "train": "train, calibrate and evaluate lenses, and write a pack (collects what is missing)",
    "evaluate": "figures of a pack on held-out texts",
    "monitor": "generate with the lenses live",
    "interpret": "what a text is about, or each token of an answer, among thousands of concepts",
    "bench": "what reading, loading and training cost, beside a baseline and a floor",
    "timeline": "the story of a saved timeline, in words, pictures and numbers",
    "encyclopedia": "cover many concepts at once, then refine those that readers doubt",
    "pack": "list, fetch, verify, compare, convert and publish packs",
}


def main() -> None:
    """Run one verb, or say which there are."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--version", "-V"):
        from importlib.metadata import version

        print(f"ftw {version('ftw-lenses')}")
    elif verb in VERBS:
        # OpenMP's threads spin while they wait for each other; with any other process on the machine that costs up to
        # nine tenths of the speed (measured: 100 instead of 700 tokens/s beside one busy process, no loss when alone).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # glibc gives large blocks back to the system at once, and every pass of a model asks for them anew: a quarter
        # of the time of collecting went into empty pages. These let a process keep up to 1 GiB; others ignore them.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
        os.execv(sys.executable, [sys.executable, "-m", f"ftw.cli.{verb}", *sys.argv[2:]])
    else:
        lines = [f"  ftw {name:<14}{words}" for name, words in VERBS.items()]
        text = "\n".join(["usage: ftw VERB [key=value ...]", "", *lines, "", "ftw VERB --help says what a verb takes."])
        if verb in ("--help", "-h", "help"):
            print(text)
        else:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"; did you mean ftw {near[0]}?" if near else ""
            print(f"ftw: there is no verb {verb!r}{hint}\n\n{text}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
