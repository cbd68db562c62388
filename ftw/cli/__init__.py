"""The command line: one module a verb, each a Hydra program over a typed job."""
