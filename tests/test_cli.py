"""The command line: exit codes, one-line errors, one JSON document, and what help loads."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recur import cli
from recur.pipeline import terminal
from recur.storage.store import Store
from recur.vocabulary import StoreBusy

HEAVY = {
    "torch",
    "lightning",
    "polars",
    "duckdb",
    "numpy",
    "matplotlib",
    "pybit",
    "pandas",
    "scipy",
    "pyarrow",
}


def recur(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RECUR_")}
    command = [sys.executable, "-m", "recur.cli", *words]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECUR_HOME", raising=False)
    return tmp_path


def error_of(text: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(text)["error"]
    return found


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from recur.cli import run\n"
        "codes = [run(words.split()) for words in ('--help', 'train --help', 'schedule install --help')]\n"
        f"print('LOADED', codes, sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED [0, 0, 0] []"
    assert "Calibrated forecasts" in done.stdout


def test_global_options_may_stand_anywhere() -> None:
    words = [
        "fetch",
        "--json",
        "-s",
        "A",
        "--home",
        "h",
        "--set=a.b=1",
        "-c",
        "x.toml",
        "--days",
        "3",
        "--",
        "-q",
    ]
    assert cli.hoist(words) == [
        "--json", "--home", "h", "--set=a.b=1", "-c", "x.toml", "fetch", "-s", "A", "--days", "3", "--", "-q",
    ]  # fmt: skip
    assert cli.hoist(["fetch", "--home"]) == ["--home", "fetch"]


def test_wrong_usage_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = recur(tmp_path, "fecth")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "recur: No such command 'fecth'. Did you mean 'fetch'? See recur --help.\n"


def test_with_json_an_error_is_one_document(tmp_path: Path) -> None:
    done = recur(tmp_path, "fetch", "--days", "many", "--json")
    assert done.returncode == 2
    assert error_of(done.stdout)["code"] == 2
    assert "'--days'" in str(error_of(done.stdout)["message"])
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["status", "--set", "train.epoch=3"], 2, "Did you mean 'train.epochs'?"),
        (["fetch", "--since", "soon"], 2, "Cannot read the time 'soon'"),
        (["fetch", "--since", "2025-01-01", "--days", "3"], 2, "Both --since and --days"),
        (["fetch", "--source", "bybt"], 2, "Did you mean 'bybit'?"),
        (["fetch", "-s", "BTC USDT"], 2, "is not a symbol"),
        (["fetch", "-s", ","], 2, "--symbols names nothing"),
        (["fetch", "--kinds", "candle"], 2, "announcements news. Did you mean 'candles'? (flag)"),
        (["train", "prise"], 2, "Did you mean 'price'?"),
        (["ledger"], 2, "Missing command"),
        (["ledger", "show"], 3, "no store"),
        (["verdict"], 3, "no finished backtest"),
        (["verdict", "nothing"], 3, "no run 'nothing'"),
        (["report", "../x"], 2, "is not a run id"),
    ],
)
def test_an_error_has_its_exit_code_one_line_and_one_document(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert cli.run([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert message in str(error_of(out)["message"])
    assert error_of(out)["code"] == code
    assert err.startswith("recur: ") and err.count("\n") == 1


def test_a_file_where_the_workspace_should_be_is_refused_by_every_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("")
    for words in (["status"], ["train"], ["ledger", "show"]):
        assert cli.run(["--home", "file", *words]) == 2
        assert capsys.readouterr().err == "recur: The workspace file is not a folder. Give another --home.\n"


def test_no_color_leaves_no_escape_sequence_at_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.table("Title", ["a"], [["b"]])
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.table("Title", ["a"], [["b"]])
    assert "\x1b" not in capsys.readouterr().out


def test_a_message_of_another_program_is_told_from_the_hint_after_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["status", "extra"]) == 2
    message = "recur: Got unexpected extra argument(s) (extra). See recur status --help.\n"
    assert capsys.readouterr().err == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_output_is_one_line_without_a_traceback(here: Path) -> None:
    for words in (["status"], ["status", "--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "recur.cli", *words], cwd=here, stdout=full, stderr=subprocess.PIPE,
                text=True, check=False, timeout=60,
            )  # fmt: skip
        assert done.returncode == 1
        assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_foreseen_unforeseen_and_interrupting_exceptions_keep_to_the_form(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(error: BaseException, *words: str) -> tuple[int, str]:
        def starter() -> str:
            raise error

        monkeypatch.setattr(cli, "starter_toml", starter)
        return cli.run(["init", *words]), capsys.readouterr().err

    assert outcome(StoreBusy("Process 7 holds the store.", "Wait.")) == (
        75,
        "recur: Process 7 holds the store. Wait.\n",
    )
    assert outcome(ZeroDivisionError("a\nb")) == (1, "recur: ZeroDivisionError: a b. -vv shows where.\n")
    assert outcome(KeyboardInterrupt()) == (130, "recur: Interrupted.\n")
    assert outcome(SystemExit(0)) == (1, "recur: The command was ended by SystemExit(0). -vv shows where.\n")
    code, err = outcome(ZeroDivisionError("x"), "-vv")
    assert code == 1
    assert "Traceback" in err and err.endswith("recur: ZeroDivisionError: x\n")


def test_init_writes_once_and_the_file_is_then_used(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init"]) == 0
    assert cli.run(["init"]) == 2
    assert cli.run(["init", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"path": "recur.toml"}
    Path("recur.toml").write_text("[store]\nwait_s = 5\n")
    assert cli.run(["-v", "status"]) == 0
    assert "store.wait_s = 5.0  (recur.toml)" in capsys.readouterr().err
    assert cli.run(["status", "-v", "--wait", "7"]) == 0
    assert "store.wait_s = 7.0  (flag)" in capsys.readouterr().err


def test_status_of_an_empty_home_is_not_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--json", "--home", "h"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "home": str(here / "h"), "series": [], "measures": [], "sha256": None, "rules": {}, "runs": [], "forecasts": [],
    }  # fmt: skip


def test_require_edge_exits_5_when_the_verdict_finds_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / ".recur" / "runs" / "backtest-gru-1"
    folder.mkdir(parents=True)
    metrics = {"run_id": "backtest-gru-1", "verdict": {"skill": "none", "text": "No better than the walk."}}
    (folder / "manifest.json").write_text('{"status": "complete"}')
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert cli.run(["verdict", "backtest-gru-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics
    assert cli.run(["verdict", "backtest-gru-1", "--require-edge"]) == 5
    out, err = capsys.readouterr()
    assert "No better than the walk." in out
    assert err.count("\n") == 1


def test_json_has_neither_nan_nor_infinity() -> None:
    assert (
        terminal.to_json({"a": [float("nan"), float("inf"), 1.5], "p": Path("x")})
        == '{"a": [null, null, 1.5], "p": "x"}'
    )


def test_version_and_doctor_answer_in_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["version"]
    assert cli.run(["doctor", "--offline", "--json"]) == 0
    checks = {check["name"]: check["ok"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["store"] and checks["disk"] and "venue" not in checks


def test_the_sandbox_serves_until_it_is_told_to_end_and_fetch_brings_its_market(here: Path) -> None:
    words = [
        "sandbox",
        "serve",
        "--port",
        "0",
        "--since",
        "2025-01-01",
        "--until",
        "2025-01-05",
        "--speed",
        "0",
    ]
    command = [sys.executable, "-m", "recur.cli", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here) as server:
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            with urllib.request.urlopen(f"{url}/v5/market/time", timeout=10) as reply:
                assert json.load(reply)["time"] == 1736035200000
            fetch = [
                "--set",
                "fetch.lag_s=0",
                "fetch",
                "--source",
                "sandbox",
                "--base-url",
                url,
                "-s",
                "BTCUSDT",
                "--days",
                "2",
                "--json",
            ]
            dry = recur(here, *fetch, "--dry-run")
            assert (dry.returncode, dry.stderr) == (0, "")
            assert not (here / ".recur" / "market.duckdb").exists()
            first = recur(here, *fetch)
            assert (first.returncode, first.stderr) == (0, "")
            assert json.loads(first.stdout)["source"] == "sandbox"
            again = json.loads(recur(here, *fetch[:-3], "--json").stdout)
            assert again["new"] == 0
            (series,) = json.loads(recur(here, "status", "--json").stdout)["series"]
            assert (series["series"], series["rows"]) == ("bybit:linear:BTCUSDT:1h", 48)
            assert series["last"] == "2025-01-04T23:00:00Z"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_a_taken_port_is_one_line(here: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = recur(
            here, "sandbox", "serve", "--since", "2025-01-01", "--until", "2025-01-03", "--port", port
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"recur: Port {port} cannot be used")


def test_the_ledger_is_verified_and_an_altered_entry_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(here / ".recur")
    at = datetime(2025, 1, 1, tzinfo=UTC)
    rows = [
        {"unique_id": "bybit:linear:BTCUSDT:1h", "cutoff": at, "ds": at, "horizon": h, "model": "gru", "run_id": "r",
         "made_at": at, "mean": 0.0}
        for h in (1, 6)
    ]  # fmt: skip
    assert store.append_forecasts(pl.DataFrame(rows)) == 2
    assert cli.run(["ledger", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"entries": 2, "ok": True, "first_broken": None}
    with store.write() as con:
        con.execute("UPDATE forecasts SET mean = 0.5 WHERE horizon = 1")
    assert cli.run(["ledger", "verify", "--json"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out) == {"entries": 2, "ok": False, "first_broken": 1}
    assert "Entry 1 of the ledger does not fit" in err
