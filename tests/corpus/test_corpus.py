"""Every model of onnx's own tests: read or refused with a reason, never a crash, and written back as it was.

A model that nothing is done to comes out byte for byte. Where one bit of a weight is changed, that bit is all that
differs, on the wire and to protobuf.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus.sources import entries
from corpus.survey import Survey, table


def survey_of(every: int, most: int | None, folder: Path, record_property) -> Survey:  # type: ignore[no-untyped-def]
    survey = Survey(folder, most)
    for entry in entries(every):
        survey.add(entry)
    record_property("table", f"models that onnxcare reads, and writes back\n{table(survey)}")
    assert not survey.problems, "\n".join(survey.problems[:20])
    return survey


def total(survey: Survey, what: str) -> int:
    return sum(number for (_, counted), number in survey.counts.items() if counted == what)


def test_every_tenth_model(tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    survey = survey_of(10, 1, tmp_path, record_property)
    assert total(survey, "loaded") > 100 and total(survey, "patched") > 40


@pytest.mark.slow
def test_every_model(tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    survey = survey_of(1, None, tmp_path, record_property)
    assert total(survey, "loaded") > 2000 and total(survey, "patched") > 1500
    assert total(survey, "identical") == total(survey, "loaded") == total(survey, "inspected")
