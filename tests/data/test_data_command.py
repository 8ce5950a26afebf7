"""`lrm-recall data`: tables, exit codes, one line for every mistake."""

import subprocess
import sys

import pytest
from corpus_files import small_corpus

from lrm_recall.data.prepared import folders
from lrm_recall.workbook import main


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    """What names a small corpus on the command line."""
    wanted = small_corpus(tmp_path, monkeypatch)
    return ["small", "-p", f"offline={wanted.offline}", "-p", f"tokenizer={wanted.tokenizer}"]


def test_prepare_list_verify(options, capsys):
    assert main(["data", "list"]) == 0
    assert capsys.readouterr().out.endswith("nothing\n")
    assert main(["data", "verify"]) == 0
    assert capsys.readouterr().out == "nothing is prepared\n"
    assert main(["data", "prepare", *options]) == 0
    output = capsys.readouterr()
    header, *rows = output.out.splitlines()
    assert header.split() == "corpus source split articles tokens words longest tokenizer folder".split()  # noqa: SIM905
    assert [row.split()[:4] for row in rows] == [
        ["small", "offline:articles.jsonl", "train", "58"],
        ["small", "offline:articles.jsonl", "validation", "1"],
        ["small", "offline:articles.jsonl", "test", "1"],
    ]
    assert "small: from offline:articles.jsonl" in output.err
    assert main(["data", "list"]) == 0
    assert output.out in capsys.readouterr().out
    for words in (["data", "verify"], ["data", "verify", "small"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"{folders()[0].name}: in order\n"


def test_verify_finds_damage_and_fresh_repairs_it(options, capsys):
    assert main(["data", "prepare", *options]) == 0
    file = folders()[0] / "train.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["data", "verify"]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert f"lrm-recall: {file} has the wrong checksum" in output.err
    assert main(["data", "prepare", *options]) == 1
    assert main(["data", "prepare", *options, "--fresh"]) == main(["data", "verify"]) == 0


def test_a_parameter_file_names_a_corpus(options, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    values = "".join(f"  {option.replace('=', ': ', 1)}\n" for option in options[2::2])
    file.write_text(f"steps: 3\ncorpus:\n  name: small\n{values}")
    assert main(["data", "prepare", str(file), "-p", "max_articles=20"]) == 0
    assert " 18 " in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["prepare", "wikitxt103"], "lrm-recall: unknown corpus 'wikitxt103' (did you mean 'wikitext103'?); there are: "),
    (["prepare", "squad", "-p", "tokeniser=x"], "has no option 'tokeniser' (did you mean 'tokenizer'?)"),
    (["prepare", "squad", "-p", "max_articles"], "must be name=value"),
    (["prepare", "squad", "-p", "source=3"], "option 'source' must be str, got 3 (int)"),
    (["prepare", "missing.yaml"], "there is no file missing.yaml"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_done(options, capsys, words, message):
    assert main(["data", *words]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert message in output.err
    assert folders() == []


def test_a_file_without_a_corpus(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    assert main(["data", "prepare", str(tmp_path / "run.yaml")]) == 2
    assert "has no corpus" in capsys.readouterr().err


def test_what_cannot_be_had_exits_with_1(options, capsys):
    assert main(["data", "prepare", *options, "--vocab-size", "100"]) == 1
    assert "more than the model's vocab_size 100" in capsys.readouterr().err
    assert main(["data", "verify", "other"]) == 1
    assert capsys.readouterr().err == "lrm-recall: other is not prepared\n"


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys; from lrm_recall.workbook import main; main(['data', 'list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
