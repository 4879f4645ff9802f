"""What onnxcare makes of models that other people published: a survey, as a table, JSON and a page of the docs.

    python -m benchmarks.third_party [--only WORD ...] [--cache FOLDER] [--patience S]

from the root of the repository, with the packages of the extra `bench`. The packages are fetched by name and exact
version into a cache, checked by SHA-256 and taken apart there: nothing is installed, and nothing of them is kept in the
repository. Every model is worked on in a process of its own, step by step:

    load        onnxruntime runs it, and `inspect` lists its layers and sites
    copy        the copy that experiments run on answers as the file does, several samples in one run
    intervene   do(unit := value) at every site, behind a cut, against a run of the file changed by hand
    owner       what its owner would do: `locate` and `fix`, with a spec and data for it

The runs by hand (`by_hand.py`) rest on onnx and onnxruntime alone. Then a sweep over the models of single operators
(`operators.py`) takes the steps `load`, `copy` and `intervene`.
"""
