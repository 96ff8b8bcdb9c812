"""What can be tested of lmms-eval's adapter without lmms-eval; test_lmms_eval.sh tests the rest."""


def test_without_lmms_eval_the_way_to_get_it_is_named(tmp_path, run):
    (tmp_path / "lmms_eval.py").write_text("raise ModuleNotFoundError('gone', name='lmms_eval')\n")
    result = run(
        "scripts/lmms_eval/lmms_eval_model.py", "--tasks", "pope", expect=1, PYTHONPATH=str(tmp_path)
    )

    (line,) = result.stderr.splitlines()
    assert (
        line
        == "error: no package lmms_eval; make an environment with `bash scripts/lmms_eval/test_lmms_eval.sh`"
    )
