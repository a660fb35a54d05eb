"""Broken formulas are caught: two of them here; `python scripts/break_formulas.py` tries all."""

import pytest

import break_formulas
from conftest import ROOT

ROWS = break_formulas.TABLE["formulas"]


@pytest.mark.parametrize("row", ROWS, ids=[row["breaks"] for row in ROWS])
def test_each_formula_stands_once_where_the_table_says(row):
    cells = break_formulas.cells_for(row["notebook"], row["check"])
    text = (ROOT / row["file"]).read_text(encoding="utf-8") if "file" in row else "\n\n".join(cells)
    assert break_formulas.replaced(text, row) != text


def test_there_are_twenty_of_them():
    assert len({row["breaks"] for row in ROWS}) == len(ROWS) >= 20


def test_a_formula_of_a_cell_and_one_of_a_file_are_caught(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["break_formulas.py", "AUROC", "--jobs", "1"])
    assert break_formulas.main() == 0
    out = capsys.readouterr().out
    assert "the notebook's own cell" in out and "spgdd/evaluation/metrics.py" in out
    assert "gets 50 %" in out and out.endswith("2 formulas broken, 0 survived\n")


def test_a_formula_that_survives_fails_the_script(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["break_formulas.py", "AUROC"])
    monkeypatch.setattr(break_formulas, "failure", lambda notebook, cells, row=None: None)
    assert break_formulas.main() == 1 and "SURVIVED" in capsys.readouterr().out


def test_a_check_that_fails_unbroken_is_no_proof(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["break_formulas.py", "AUROC"])
    monkeypatch.setattr(break_formulas, "failure", lambda notebook, cells, row=None: "NameError: x")
    assert break_formulas.main() == 1 and "FAILS AS IT IS: NameError: x" in capsys.readouterr().out
