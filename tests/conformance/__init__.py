"""The portable graphs in runtimes other than onnxruntime, a file per runtime.

Each file has `TITLE`, `PACKAGE` (what has a version), `MODULES` (what must be installed), `SIZES` (whether the runtime
takes graphs with open dimensions) and `run(file, inputs)`: the outputs of a graph, loaded by the runtime's own loader.
`python -m tests.conformance --write` measures all of them and writes the tables of `docs/runtimes.md`.
"""
