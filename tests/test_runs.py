"""Run folders: names, atomic files, and which runs may be opened."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recur.storage.runs import RunFolder, latest_run, list_runs, new_run_id, open_run
from recur.vocabulary import DataMissing, UsageError, parse_time

NOON = parse_time("2025-07-01T12:00")


def made(home: Path, run_id: str, status: str = "complete") -> RunFolder:
    run = RunFolder(home, run_id)
    run.write_json("manifest.json", {"status": status, "run_id": run_id})
    return run


def test_run_ids_tell_kind_model_and_time_and_never_repeat() -> None:
    ids = {new_run_id("train", "gru", NOON) for _ in range(50)}
    assert len(ids) == 50
    assert all(re.fullmatch(r"train-gru-20250701T120000-[0-9a-f]{6}", run_id) for run_id in ids)
    assert new_run_id("backtest", "../my model", NOON).startswith("backtest-___my_model-20250701T120000-")


def test_a_complete_run_opens_and_reads_back_its_files(tmp_path: Path) -> None:
    made(tmp_path, "train-gru-1")
    run = open_run(tmp_path, "train-gru-1")
    assert run.path == tmp_path / "runs" / "train-gru-1"
    assert run.read_manifest() == {"status": "complete", "run_id": "train-gru-1"}
    assert run.write_text("config.toml", "x = 'é'\n") == run.config
    assert run.config.read_text(encoding="utf-8") == "x = 'é'\n"
    assert [run.weights.name, run.metrics.name, run.predictions.name, run.features.name] == [
        "model.safetensors",
        "metrics.json",
        "predictions.parquet",
        "features.json",
    ]


def test_an_unknown_run_is_refused_with_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(DataMissing) as caught:
        open_run(tmp_path, "train-gru-1")
    assert caught.value.hint == "No run exists yet: `recur train price` makes one."
    made(tmp_path, "train-gru-20250701")
    with pytest.raises(DataMissing, match=re.escape("Did you mean 'train-gru-20250701'?")):
        open_run(tmp_path, "train-gru-20250702")


def test_a_run_id_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("../x", "", "a/b", ".hidden", "a b"):
        with pytest.raises(UsageError, match="is not a run id"):
            open_run(tmp_path, name)


def test_an_unfinished_run_says_what_to_do(tmp_path: Path) -> None:
    made(tmp_path, "train-gru-1", "running")
    with pytest.raises(DataMissing, match="still running") as caught:
        open_run(tmp_path, "train-gru-1")
    assert "recur train --resume train-gru-1" in caught.value.hint
    made(tmp_path, "backtest-gru-1", "running")
    with pytest.raises(DataMissing, match="still running") as caught:
        open_run(tmp_path, "backtest-gru-1")
    assert "--resume" not in caught.value.hint and "remove " in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b'{"status": "comp', b"[1]", b"\xff\xfe", b"{}"])
def test_a_half_written_run_is_refused_with_a_remedy(tmp_path: Path, content: bytes | None) -> None:
    run = RunFolder(tmp_path, "train-gru-1")
    run.path.mkdir(parents=True)
    if content is not None:
        run.manifest.write_bytes(content)
    with pytest.raises(DataMissing) as caught:
        open_run(tmp_path, "train-gru-1")
    assert caught.value.hint.startswith(f"The run was cut short or damaged: remove {run.path}")
    assert run.status() == "broken"


def test_the_latest_run_is_the_newest_complete_one_of_its_kind(tmp_path: Path) -> None:
    assert latest_run(tmp_path, "train") is None
    made(tmp_path, "train-zeta-20250701T120000-aaaaaa")
    made(tmp_path, "train-gru-20250702T120000-aaaaaa")
    made(tmp_path, "train-gru-20250703T120000-aaaaaa", "running")
    made(tmp_path, "backtest-gru-20250704T120000-aaaaaa")
    assert latest_run(tmp_path, "train") == "train-gru-20250702T120000-aaaaaa"
    assert latest_run(tmp_path, "backtest") == "backtest-gru-20250704T120000-aaaaaa"
    assert [(run.run_id[:9], run.status()) for run in list_runs(tmp_path)] == [
        ("train-zet", "complete"),
        ("train-gru", "complete"),
        ("train-gru", "running"),
        ("backtest-", "complete"),
    ]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    run = made(tmp_path, "r")
    run.write_json("metrics.json", {"crps": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_json("metrics.json", {"crps": float("nan")})
    (run.path / "report.html").mkdir()
    with pytest.raises(OSError):
        run.write_text("report.html", "x")
    assert run.read_json("metrics.json") == {"crps": 1.0}
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        "manifest.json",
        "metrics.json",
        "report.html",
    ]


def test_a_file_rewritten_by_a_killed_process_is_always_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from recur.storage.runs import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]), 'r')\n"
        "for i in range(10**6):\n"
        "    run.write_json('metrics.json', {'i': i, 'pad': 'x' * 500000}); print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(3):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert len(RunFolder(tmp_path, "r").read_json("metrics.json")["pad"]) == 500000
