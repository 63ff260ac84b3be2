"""The ``recur`` command. Only the standard library, Typer and the configuration load here: a command imports the
rest when it runs, so that ``recur --help`` answers at once.

Standard output carries the result (with ``--json`` exactly one document, whatever a library prints); progress,
logs and errors go to standard error. An error is one line, its exit code is that of ``recur.vocabulary``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from recur.pipeline import terminal
from recur.pipeline.config import TEXT_KINDS, Config, is_pattern
from recur.pipeline.settings import Provenance, load_config, starter_toml
from recur.vocabulary import (
    CheckFailed,
    DataMissing,
    RecurError,
    UsageError,
    did_you_mean,
    iso,
    parse_time,
)

if TYPE_CHECKING:
    from threading import Event

    from recur.connectors.bybit import BybitConnector
    from recur.connectors.sandbox.world import World
    from recur.pipeline.plan import FetchRequest
    from recur.storage.store import Store

DEFAULT_HOME = ".recur"
SANDBOX_PORT = 8899
INTERRUPTED, NO_EDGE = 130, 5

app = typer.Typer(
    rich_markup_mode=None,
    name="recur",
    help="Calibrated forecasts for crypto markets, judged honestly against simple baselines.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(rich_markup_mode=None, help="The forecast track record.")
schedule_app = typer.Typer(rich_markup_mode=None, help="The cron entry that runs fetch and then predict.")
sandbox_app = typer.Typer(rich_markup_mode=None, help="A local exchange for trying things out.")
app.add_typer(ledger_app, name="ledger")
app.add_typer(schedule_app, name="schedule")
app.add_typer(sandbox_app, name="sandbox")


@dataclass
class State:
    """What the global options say, and where results go."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    home: Path = Path(DEFAULT_HOME)
    home_given: bool = False
    files: list[Path] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    json: bool = False
    verbose: int = 0
    quiet: bool = False
    wait: float | None = None

    @property
    def progress(self) -> bool:
        """Whether to draw progress: only for a person at a terminal."""
        return sys.stderr.isatty() and not self.quiet

    def config(self, **flags: object) -> Config:
        """The resolved configuration; ``section__key=value`` are the command's flags (None: not given)."""
        given = {key.replace("__", "."): value for key, value in flags.items()}
        config, provenance = load_config(self.files, self.sets, given | {"store.wait_s": self.wait})
        if self.verbose:
            _print_provenance(provenance)
        return config

    def store(self, config: Config) -> Store:
        from recur.storage.store import Store

        return Store(self.home, config.store.wait_s)

    def result(self, document: Mapping[str, Any], people: Callable[[], None]) -> None:
        """The one result of a command: the JSON ``document``, or whatever ``people`` prints."""
        if self.json:
            print(terminal.to_json(document), file=self.out, flush=True)
        else:
            people()


# -- entry -------------------------------------------------------------------------------------------------------

_GLOBAL_FLAGS = {"--json", "--no-color", "-q", "--quiet", "-v", "-vv", "--verbose"}
_GLOBAL_VALUES = {"--home", "-c", "--config", "--set", "--wait"}


def hoist(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the global options in front, wherever they were typed (up to a lone ``--``)."""
    front, rest = [], []
    left = iter(arguments)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word in _GLOBAL_FLAGS or word.partition("=")[0] in _GLOBAL_VALUES - {"-c", word}:
            front.append(word)
        elif word in _GLOBAL_VALUES:
            front += [word, *([value] if (value := next(left, None)) is not None else [])]
        else:
            rest.append(word)
    return front + rest


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Never raises, whatever the command does."""
    words = hoist(arguments)
    as_json = "--json" in words and not {"-h", "--help"} & set(words)
    if "--no-color" in words:
        os.environ["NO_COLOR"] = "1"
    state = State(out=sys.stdout, json=as_json)
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with aside:
            code = app(args=words, prog_name="recur", standalone_mode=False, obj=state)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except RecurError as error:
        _fail(state, error, error.exit_code, error.message, error.hint)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort) as error:
        _fail(state, error, INTERRUPTED, "Interrupted.", "")
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:  # of code that is not ours, such as a user's own model
        if isinstance(error.__context__, BrokenPipeError):  # rich met it first
            return _reader_gone()
        _fail(state, error, 1, f"The command was ended by SystemExit({error.code!r}).", "-vv shows where.")
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: one line instead of a traceback
        return _unexpected(state, error)


def _reader_gone() -> int:
    """As in `recur status | head`: nothing is left to say, nor anybody to say it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _unexpected(state: State, error: Exception) -> int:
    """Report wrong usage that Typer found (exit 2), or anything nobody foresaw (exit 1)."""
    if isinstance(error, typer.BadParameter.__mro__[1]):  # UsageError, which Typer does not export
        command = getattr(getattr(error, "ctx", None), "command_path", "recur")
        message = str(getattr(error, "message", error)) or "A command is expected."
        if hasattr(error, "format_message"):
            message = error.format_message() or message
        _fail(state, error, 2, message, f"See {command} --help.")
        return 2
    hint = "" if state.verbose > 1 else "-vv shows where."
    _fail(state, error, 1, f"{type(error).__name__}: {error}", hint)
    return 1


def _fail(state: State, error: BaseException, code: int, message: str, hint: str) -> None:
    line, hint = " ".join(message.split()), " ".join(hint.split())
    line += "." if hint and line[-1:] not in ".:!?…" else ""
    if state.verbose > 1:
        traceback.print_exception(error, file=sys.stderr)
    with contextlib.suppress(OSError):  # whoever reads may be gone, or the disk full
        print(f"recur: {line} {hint}".rstrip(), file=sys.stderr)
        if state.json:
            body = {"code": code, "message": line, "hint": hint, "type": type(error).__name__}
            print(terminal.to_json({"error": body}), file=state.out, flush=True)


def main() -> None:
    """The console entry."""
    sys.exit(run(sys.argv[1:]))


@app.callback(invoke_without_command=True)
def _globals(
    ctx: typer.Context,
    home: Annotated[
        Path | None, typer.Option(help=f"Workspace folder.  [env RECUR_HOME, else {DEFAULT_HOME}]")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("-c", "--config", help="TOML file instead of ./recur.toml; repeat, later wins."),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; repeat.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "-v", "--verbose", count=True, help="Show the settings and their origin; -vv tracebacks."
        ),
    ] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, errors only.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain output.")] = False,
    wait: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Patience while another process holds the store.")
    ] = None,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    state = ctx.obj if isinstance(ctx.obj, State) else State()
    ctx.obj = state
    state.home = home or Path(os.environ.get("RECUR_HOME") or DEFAULT_HOME)
    if state.home.exists() and not state.home.is_dir():
        raise UsageError(f"The workspace {state.home} is not a folder.", "Give another --home.")
    state.home_given = home is not None
    local = Path("recur.toml")
    state.files = list(config) if config else [local] if local.exists() else []
    state.sets = sets or []
    state.json, state.verbose, state.quiet, state.wait = as_json, verbose, quiet, wait
    level = logging.ERROR if quiet else [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("recur").setLevel(level)  # only ours: other loggers may show request headers
    if show_version:
        from importlib.metadata import version

        text = version("recur")
        state.result({"version": text}, lambda: print(f"recur {text}"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        if as_json:
            raise UsageError("A command is expected.", "See recur --help.")
        print(ctx.get_help())


# -- printing ----------------------------------------------------------------------------------------------------


def _print_provenance(provenance: Provenance) -> None:
    for key, (value, origin) in provenance.items():
        print(f"{key} = {value!r}  ({origin})", file=sys.stderr)


# -- options that several commands share ---------------------------------------------------------------------------

Symbols = Annotated[
    list[str] | None,
    typer.Option("-s", "--symbols", help="BTCUSDT,ETHUSDT or BTC/USDT:USDT; commas or repeat."),
]
Interval = Annotated[str | None, typer.Option("-i", "--interval", help="Bar length: 1m … 1h … 1d 1w 1M.")]
Category = Annotated[str | None, typer.Option(help="linear, inverse or spot.")]
BaseUrl = Annotated[str | None, typer.Option(help="Other address of the venue.")]
AllowGaps = Annotated[bool, typer.Option("--allow-gaps", help="Use ranges with holes that nothing explains.")]
Since = Annotated[str | None, typer.Option(metavar="TIME", help="From this UTC time on, ISO-8601.")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Before this UTC time, ISO-8601.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME|FILE.py:CLASS", help="Name of the model, or your own in a file.")
]
TrustModel = Annotated[
    bool, typer.Option("--trust-model", help="Let a run of a model from a file run that code.")
]
Epochs = Annotated[int | None, typer.Option(help="Most passes over the data.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Pool = Annotated[list[str] | None, typer.Option(help="File of candles used for training only; repeat.")]
RequireEdge = Annotated[bool, typer.Option("--require-edge", help="Exit 5 when the verdict finds no skill.")]


def _words(values: Sequence[str] | None) -> list[str] | None:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``; None stays None. UsageError when nothing but commas was given."""
    if not values:
        return None
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    if not words:
        raise UsageError("--symbols names nothing.", "Give some, as in '-s BTCUSDT,ETHUSDT'.")
    return words


def _time(text: str | None) -> int | None:
    return None if text is None else parse_time(text)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# -- commands ------------------------------------------------------------------------------------------------------


@app.command()
def init(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recur.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a commented recur.toml."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already.", "--force overwrites it.")
    try:
        path.write_text(starter_toml(), "utf-8")
    except OSError as error:
        raise RecurError(f"Cannot write {path}: {error}.") from None
    ctx.obj.result({"path": str(path)}, lambda: print(f"Wrote {path}: every setting with its default."))


@app.command()
def fetch(
    ctx: typer.Context,
    symbols: Symbols = None,
    interval: Interval = None,
    category: Category = None,
    since: Since = None,
    until: Until = None,
    days: Annotated[
        int | None, typer.Option(help="Days of history; else fetch.days for what is new.")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="candles,mark,index,premium,funding,open_interest,long_short,instruments,announcements,news."
        ),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="bybit, sandbox, a file, or a feed's address; repeat.")
    ] = None,
    base_url: BaseUrl = None,
    workers: Annotated[int | None, typer.Option(help="Parallel requests.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be asked.")] = False,
    wait_ban: Annotated[
        bool, typer.Option("--wait-ban", help="Wait when the venue bans this address, instead of failing.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Then bring in each bar as it closes.")] = False,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="Follow so long: 90s, 20m, 24h, 7d.")
    ] = None,
) -> None:
    """Bring the store up to date from the venue, the sandbox, or files. Symbols may be *USDT or top:20."""
    state: State = ctx.obj
    if for_ is not None and not follow:
        raise UsageError("--for says how long to follow, and --follow was not given.")
    if since is not None and days is not None:
        raise UsageError("Both --since and --days were given.", "Give one of them.")
    words = _words(symbols)
    config = state.config(
        market__symbols=[word for word in words or () if not is_pattern(word)] or None, market__interval=interval, market__category=category, fetch__days=days,
        fetch__kinds=kinds, fetch__base_url=base_url, fetch__workers=workers,
    )  # fmt: skip
    sources = source or ["bybit"]
    for name in sources:
        if name not in ("bybit", "sandbox") and "://" not in name and not Path(name).is_file():
            guess = did_you_mean(name, ("bybit", "sandbox"))
            raise UsageError(f"Source '{name}' is neither bybit, sandbox, a file nor an address.{guess}")
    span = (_time(since), _time(until))
    if follow and (len(sources) > 1 or sources[0] not in ("bybit", "sandbox")):
        raise UsageError("--follow needs one venue to follow.", "Give --source bybit or --source sandbox.")
    results = []
    for name in sources:
        if name in ("bybit", "sandbox"):
            asked = _asked_of_venue(state, config, name, words or (), span, days, dry_run, wait_ban)
            done = _follow_venue(state, *asked, for_) if follow else _fetch_venue(state, *asked, config)
        elif "://" in name and not dry_run:
            from recur.pipeline.news import fetch_feeds

            (done,) = fetch_feeds(state.store(config), [name], _now_ms(), config.news.languages)
        elif dry_run:
            done = {"file": name, "windows": 0, "requests": 0}
        else:
            from recur.pipeline.imports import import_file

            done = import_file(
                state.store(config), Path(name), category=config.market.category,
                languages=config.news.languages, now_ms=_now_ms(),
            )  # fmt: skip
        results.append({"source": name, **done})

    def people() -> None:
        for result in results:
            if dry_run and (series := result.get("series")):
                columns = ["series", "since", "until", "windows", "bars"]
                terminal.table("To ask", columns, ([row.get(key) for key in columns] for row in series))
            terminal.pairs("Plan" if dry_run else "Followed" if follow else "Fetched", result)
            if reasons := result.get("reasons"):
                terminal.table("Missing bars", ["reason", "bars"], reasons.items())
            if texts := result.get("texts"):
                terminal.table("Texts", list(texts[0]), (list(row.values()) for row in texts))

    state.result(results[0] if len(results) == 1 else {"sources": results}, people)


def _asked_of_venue(
    state: State,
    config: Config,
    source: str,
    words: Sequence[str],
    span: tuple[int | None, int | None],
    days: int | None,
    dry_run: bool,
    wait_ban: bool,
) -> tuple[Store, BybitConnector, FetchRequest]:
    """Where to, whom to ask and what for; ``words`` are the symbols as they were typed."""
    from recur.connectors.bybit import BybitConnector
    from recur.pipeline.plan import FetchRequest

    sandbox = f"http://127.0.0.1:{SANDBOX_PORT}" if source == "sandbox" else None
    connector = BybitConnector(
        config.fetch.base_url or sandbox,
        workers=config.fetch.workers,
        rate=config.fetch.rate,
        wait_ban=wait_ban,
    )
    request = FetchRequest(
        symbols=tuple(words) if any(map(is_pattern, words)) else config.market.symbols,
        category=config.market.category, interval=config.market.interval,
        kinds=tuple(kind for kind in config.fetch.kinds if kind not in TEXT_KINDS),
        since_ms=span[0], until_ms=span[1], days=days, first_days=config.fetch.days,
        lag_ms=int(1000 * config.fetch.lag_s), dry_run=dry_run, source=source,
    )  # fmt: skip
    return state.store(config), connector, request


def _fetch_venue(
    state: State, store: Store, connector: BybitConnector, request: FetchRequest, config: Config
) -> dict[str, Any]:
    from recur.pipeline.fetch import run_fetch
    from recur.pipeline.plan import plan_fetch

    done: dict[str, Any] = {}
    if request.kinds:
        plan = plan_fetch(store, connector, request)
        if request.dry_run:
            return dict(plan.as_dict())
        with terminal.progress(state.progress, "fetching") as on_progress:
            done = dict(run_fetch(store, connector, plan, on_progress).as_dict())
    texts = [kind for kind in config.fetch.kinds if kind in TEXT_KINDS]
    if texts and not request.dry_run:
        from recur.pipeline.news import fetch_texts

        done["texts"] = fetch_texts(store, connector, texts, config.news, _now_ms())
    return done


def _follow_venue(
    state: State, store: Store, connector: BybitConnector, request: FetchRequest, duration: str | None
) -> dict[str, Any]:
    """Follow until the time is up, Ctrl-C or a polite kill: all three are a normal end."""
    import threading

    from recur.pipeline.follow import Follower, seconds_of

    for_s = None if duration is None else seconds_of(duration)
    say = (lambda line: None) if state.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    follower = Follower(store, connector, request, for_s=for_s, say=say)
    with _until_signalled() as ended:

        def end() -> None:
            _wait_for(ended)
            follower.stop()

        ender = threading.Thread(target=end)
        ender.start()
        try:
            return follower.run().as_dict()
        finally:
            ended.set()
            ender.join()


@app.command()
def status(ctx: typer.Context) -> None:
    """Show what is stored, as a certificate: ranges, gaps with reasons, freshness, content hashes; and the runs."""
    from recur.pipeline.certificate import certify
    from recur.storage.runs import list_runs

    state: State = ctx.obj
    store = state.store(state.config())
    held: dict[str, Any] = {"series": [], "measures": [], "sha256": None, "rules": {}}
    forecasts: list[dict[str, Any]] = []
    if store.path.exists():
        held, forecasts = certify(store, _now_ms()), store.forecasts(5).to_dicts()
    runs = [{"run_id": item.run_id, "status": item.status()} for item in list_runs(state.home)]
    document = {"home": str(state.home.resolve()), **held, "runs": runs, "forecasts": forecasts}

    def people() -> None:
        if not held["sha256"]:
            print(f"Nothing is stored in {state.home} yet: recur fetch brings data.")
        else:
            terminal.say_certificate(f"Series in {store.path}", held)
        if runs:
            terminal.table("Runs", ["run_id", "status"], (list(item.values()) for item in runs))
        if forecasts:
            terminal.say_forecasts("Last forecasts", forecasts)

    state.result(document, people)


@app.command()
def train(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="[price|sentiment]", help="What to train.")] = "price",
    model: Model = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    symbols: Symbols = None,
    interval: Interval = None,
    pool: Pool = None,
    since: Since = None,
    until: Until = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this unfinished run.")] = None,
    allow_gaps: AllowGaps = False,
    data: Annotated[list[Path] | None, typer.Option(help="sentiment: file of text, label; repeat.")] = None,
    pretrain: Annotated[
        list[Path] | None, typer.Option(help="sentiment: file of texts for the language model; repeat.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--from", metavar="RUN", help="sentiment: begin with this run's encoder.")
    ] = None,
    from_market: Annotated[
        bool,
        typer.Option(
            "--label-from-market",
            help="sentiment: label the stored news, or dated texts of --data, by what the price did next.",
        ),
    ] = False,
) -> None:
    """Train a price model on what is stored, or a sentiment model on files of texts."""
    state: State = ctx.obj
    if what not in ("price", "sentiment"):
        guess = did_you_mean(what, ["price", "sentiment"])
        raise UsageError(f"'{what}' cannot be trained: expected price or sentiment.{guess}")
    if what == "sentiment":
        if epochs == 0:
            raise UsageError("--epochs is 0: expected at least 1.")
        config = state.config(
            sentiment__epochs=epochs, train__seed=seed, market__symbols=_words(symbols),
            market__interval=interval, train__since=since, train__until=until,
        )  # fmt: skip
        _train_sentiment(state, config, data or [], pretrain or [], base, resume, from_market)
        return
    if data or pretrain or base or from_market:
        raise UsageError(
            "--data, --pretrain, --from and --label-from-market belong to recur train sentiment."
        )
    config = state.config(
        model__name=model, train__epochs=epochs, train__seed=seed, train__device=device, train__pool=pool,
        market__symbols=_words(symbols), market__interval=interval, train__since=since, train__until=until,
    )  # fmt: skip
    from recur.pipeline.train import train_price

    metrics = train_price(state.home, config, resume=resume, progress=state.progress, allow_gaps=allow_gaps)
    state.result(metrics, lambda: terminal.say_metrics(metrics))


def _train_sentiment(
    state: State,
    config: Config,
    data: Sequence[Path],
    pretrain: Sequence[Path],
    base: str | None,
    resume: str | None,
    from_market: bool,
) -> None:
    if not data and not from_market:
        raise UsageError(
            "recur train sentiment needs labelled texts.",
            "Give --data FILE; repeat for more. --label-from-market labels stored news by their candles.",
        )
    from recur.pipeline.sentiment_train import SentimentPlan, train_sentiment

    plan, market = SentimentPlan().with_choices(config.sentiment.epochs or None, config.train.seed), None
    if from_market:
        from recur.pipeline.market_labels import label_from_market

        market = label_from_market(state.store(config), config, data, plan.validation)
    with terminal.stages(state.progress) as say:
        metrics = train_sentiment(
            state.home, data, pretrain, base=base, plan=plan, resume=resume, market=market, config=config,
            say=say,
        )  # fmt: skip

    def people() -> None:
        for part in ("validation", "test"):
            if part in metrics:
                terminal.say_sentiment(f"{metrics['run_id']}, {part} part", metrics[part])
        if usual := metrics.get("test", {}).get("majority"):
            print(
                f"Always saying {usual['class']}: {usual['accuracy']:.3f}. The model gains {usual['gain']:+.3f}"
                f" ± {usual['se']:.3f} (standard error over {usual['days']} days)."
            )

    state.result(metrics, people)


@app.command()
def backtest(
    ctx: typer.Context,
    model: Model = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Use this trained run.")] = None,
    folds: Annotated[
        int | None, typer.Option(help="Parts of the test range, each with its own training.")
    ] = None,
    test_since: Since = None,
    test_until: Until = None,
    pool: Pool = None,
    epochs: Epochs = None,
    seed: Seed = None,
    device: Device = None,
    symbols: Symbols = None,
    interval: Interval = None,
    ablate: Annotated[
        str | None, typer.Option(metavar="PART", help="Also run without this part of the input: news.")
    ] = None,
    placebo: Annotated[
        int, typer.Option(min=0, help="With --ablate: so many runs with shuffled news times.")
    ] = 0,
    require_edge: RequireEdge = False,
    allow_gaps: AllowGaps = False,
    trust_model: TrustModel = False,
) -> None:
    """Walk forward out of sample, trade with costs, compare with the baselines."""
    state: State = ctx.obj
    config = state.config(
        model__name=model, backtest__folds=folds, backtest__test_since=test_since, backtest__test_until=test_until,
        train__pool=pool, train__epochs=epochs, train__seed=seed, train__device=device,
        market__symbols=_words(symbols), market__interval=interval,
    )  # fmt: skip
    if ablate is not None or placebo:
        return _ablate(state, config, ablate, placebo, run)
    from recur.pipeline.backtest import run_backtest
    from recur.pipeline.verdict import verdict_text

    metrics = run_backtest(
        state.home, config, run=run, progress=state.progress, allow_gaps=allow_gaps, trust=trust_model
    )

    def people() -> None:
        terminal.say_metrics(metrics)
        print(verdict_text(metrics))
        print(f"Report: {state.home / 'runs' / metrics['run_id'] / 'report.html'}")

    state.result(metrics, people)
    _check_edge(require_edge, [metrics])


def _ablate(state: State, config: Config, part: str | None, placebo: int, run: str | None) -> None:
    if part != "news":
        raise UsageError(f"--ablate is {part or 'absent'}: expected news.", "Say '--ablate news'.")
    if run is not None:
        raise UsageError("--ablate trains anew with and without the news; --run cannot be given with it.")
    from recur.pipeline.ablate import ablate_news

    result = ablate_news(state.home, config, placebo=placebo, progress=state.progress)

    def people() -> None:
        rows = [
            (h, f"{p['gain']:+.2f} %", terminal.p_value(p["dm_p"]), f"{p.get('placebo_p', float('nan')):.2f}")
            for h, p in result["horizons"].items()
        ]
        terminal.table("CRPS gained by news", ("bars ahead", "gain", "DM p", "placebo p"), rows)
        print(result["text"])

    state.result(result, people)


def _check_edge(required: bool, found: Sequence[Mapping[str, Any]]) -> None:
    without = [str(metrics.get("run_id")) for metrics in found if metrics["verdict"]["skill"] == "none"]
    if required and without:
        print(
            f"recur: The verdict finds no skill in {', '.join(without)}, and --require-edge was given.",
            file=sys.stderr,
        )
        raise typer.Exit(NO_EDGE)


@app.command()
def verdict(
    ctx: typer.Context,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Backtests; else the last.")
    ] = None,
    require_edge: RequireEdge = False,
) -> None:
    """Say on one page whether there is skill, how sure that is, and what costs leave of it."""
    from recur.pipeline.verdict import verdict_text
    from recur.storage.runs import open_run

    state: State = ctx.obj
    names = runs or [_latest_backtest(state.home)]
    found = [open_run(state.home, name).read_json("metrics.json") for name in names]
    for name, metrics in zip(names, found, strict=True):
        if "verdict" not in metrics:
            raise DataMissing(f"Run '{name}' was not backtested.", f"recur backtest --run {name} does that.")
    state.result(
        found[0] if len(found) == 1 else {"runs": found},
        lambda: print("\n\n".join(verdict_text(metrics) for metrics in found)),
    )
    _check_edge(require_edge, found)


def _latest_backtest(home: Path) -> str:
    from recur.storage.runs import latest_run

    run_id = latest_run(home, "backtest")
    if run_id is None:
        hint = "recur backtest makes one."
        if texts := latest_run(home, "sentiment"):
            hint += f" {texts} is a sentiment model: 'recur sentiment --evaluate FILE' judges it."
        raise DataMissing(f"There is no finished backtest in {home}.", hint)
    return run_id


@app.command()
def predict(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Trained run; else the last.")] = None,
    as_of: Annotated[str | None, typer.Option(metavar="TIME", help="As if this were now; UTC.")] = None,
    symbols: Symbols = None,
    trust_model: TrustModel = False,
) -> None:
    """Forecast from the last closed bar and append to the ledger."""
    state: State = ctx.obj
    config = state.config(market__symbols=_words(symbols))
    as_of_ms = _time(as_of)
    from recur.pipeline import predict as predicting

    found = predicting.predict(state.home, config, run=run, as_of_ms=as_of_ms, trust=trust_model)

    def people() -> None:
        terminal.say_forecasts(f"Forecasts ({found['appended']} new in the ledger)", found["forecasts"])

    state.result(found, people)


@app.command()
def inspect(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Trained run; else the last.")] = None,
    trust_model: TrustModel = False,
    trace: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Sentiment run: read this text token by token.")
    ] = None,
) -> None:
    """Show what a trained recurrence does: parameters, memory length, spectral radius, gates, ablation."""
    from recur.storage.runs import latest_run

    state: State = ctx.obj
    if trace is not None:
        return _trace(state, run, trace)
    from recur.pipeline.inspect import inspect_run

    run = run or latest_run(state.home, "train")
    if run is None:
        hint = "recur train price makes one."
        if texts := latest_run(state.home, "sentiment"):
            hint += f" {texts} is a sentiment model: 'recur inspect --trace TEXT' reads a text with it."
        raise DataMissing(f"There is no trained run in {state.home}.", hint)
    found = inspect_run(state.home, run, trust=trust_model)
    state.result(found, lambda: terminal.say_inspection(found))


def _trace(state: State, run: str | None, text: str) -> None:
    from recur.pipeline.sentiment import open_sentiment
    from recur.pipeline.sentiment_trace import trace

    model = open_sentiment(state.home, run)
    rows = trace(model, text)
    columns = ["token", "p_negative", "p_neutral", "p_positive"]

    def people() -> None:
        shown = ([*(row[c] for c in columns), " ".join(n["token"] for n in row["next"])] for row in rows)
        terminal.table(model.run_id, [*columns, "expected next"], shown)

    state.result({"run_id": model.run_id, "tokens": rows}, people)


@app.command()
def sentiment(
    ctx: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to score.")] = None,
    file: Annotated[Path | None, typer.Option(help="Score the texts of this file.")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Judge the model on this labelled file.")] = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="Score the stored news that have no score.")
    ] = False,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Sentiment run; else the last.")] = None,
) -> None:
    """Score texts as negative, neutral or positive, or judge a sentiment model on a labelled file."""
    state: State = ctx.obj
    if (bool(texts), file is not None, evaluate is not None, stored).count(True) != 1:
        raise UsageError(
            "Expected one of TEXT..., --file, --evaluate and --stored.", "See recur sentiment --help."
        )
    if stored:
        from recur.pipeline.score_news import score_stored

        done = score_stored(state.home, state.store(state.config()), run, _now_ms())
        return state.result(done, lambda: terminal.pairs("Stored news", done))
    from recur.pipeline.sentiment import evaluate_file, open_sentiment, score_rows

    model = open_sentiment(state.home, run)
    if evaluate is not None:
        metrics = evaluate_file(model, evaluate)
        state.result(metrics, lambda: terminal.say_sentiment(f"{evaluate} by {model.run_id}", metrics))
        return
    if file is not None:
        from recur.pipeline.labelled import read_rows

        texts = read_rows(file)
    rows = score_rows(model, texts or [])
    columns = ["label", "p_negative", "p_neutral", "p_positive", "in_training", "text"]
    state.result(
        {"run_id": model.run_id, "texts": rows},
        lambda: terminal.table(model.run_id, columns, ([row[c] for c in columns] for row in rows)),
    )


@ledger_app.command("show")
def ledger_show(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Newest entries to show.")] = 50,
    symbols: Symbols = None,
) -> None:
    """List the newest forecasts of the ledger."""
    state: State = ctx.obj
    config = state.config(market__symbols=_words(symbols))
    rows = state.store(config).forecasts(limit, config.market.symbols if symbols else None).to_dicts()

    def people() -> None:
        terminal.say_forecasts("Ledger", rows)

    state.result({"forecasts": rows}, people)


@ledger_app.command("verify")
def ledger_verify(ctx: typer.Context) -> None:
    """Prove that no entry was altered, removed or inserted: each carries the hash of the one before."""
    from recur.storage.ledger import first_broken

    state: State = ctx.obj
    entries = state.store(state.config()).forecasts()
    broken = first_broken(entries)
    document = {"entries": entries.height, "ok": broken is None, "first_broken": broken}
    state.result(
        document, lambda: print(f"{entries.height} entries: {'all' if broken is None else 'NOT all'} fit.")
    )
    if broken is not None:
        print(
            f"recur: Entry {broken} of the ledger does not fit the chain of hashes: it or one before it was altered."
            " Restore the store from a backup.",
            file=sys.stderr,
        )
        raise typer.Exit(CheckFailed.exit_code)


# -- schedule ------------------------------------------------------------------------------------------------------


@schedule_app.command("show")
def schedule_show(ctx: typer.Context) -> None:
    """Print the entry of this home."""
    from recur.pipeline import schedule

    state: State = ctx.obj
    line = schedule.show(schedule.read_crontab(), state.home.resolve())
    state.result({"installed": line is not None, "line": line}, lambda: print(line or "Not scheduled."))


@schedule_app.command("install")
def schedule_install(
    ctx: typer.Context,
    every: Annotated[str | None, typer.Option(help="Period: 5m, 1h, 4h, 1d …")] = None,
    delay: Annotated[int | None, typer.Option(metavar="SECONDS", help="Wait after the bar's close.")] = None,
) -> None:
    """Add or replace the entry of this home."""
    from recur.pipeline import schedule

    state: State = ctx.obj
    config = state.config(schedule__every=every, schedule__delay_s=delay)
    home = state.home.resolve()
    options = ["--home", str(home), "--quiet"]
    for file in state.files:
        options += ["--config", str(file.resolve())]
    for text in state.sets:
        options += ["--set", text]
    offset = datetime.now().astimezone().utcoffset()
    line = schedule.cron_line(
        home, sys.executable, options, every=config.schedule.every, delay_s=config.schedule.delay_s,
        cwd=Path.cwd(), flock=schedule.find_flock(),
        utc_offset_min=int(offset.total_seconds() // 60) if offset else 0,
    )  # fmt: skip
    try:
        before = schedule.read_crontab()
    except RecurError as error:
        if not state.json:
            print(line)
        paste = f"The line to paste is: {line}" if state.json else "The line to paste is printed above."
        raise RecurError(error.message, f"{error.hint} {paste}") from None
    (home / "logs").mkdir(parents=True, exist_ok=True)
    schedule.write_crontab(schedule.install(before, line))
    schedule.warn_of_consent(home)
    state.result({"installed": True, "line": line}, lambda: print(line))


@schedule_app.command("remove")
def schedule_remove(ctx: typer.Context) -> None:
    """Take the entry of this home away."""
    from recur.pipeline import schedule

    state: State = ctx.obj
    before = schedule.read_crontab()
    after = schedule.remove(before, state.home.resolve())
    if after != before:
        schedule.write_crontab(after)
    document = {"installed": False, "removed": after != before}
    state.result(document, lambda: print("Removed." if document["removed"] else "Was not scheduled."))


# -- report, sandbox, demo, doctor ---------------------------------------------------------------------------------


@app.command()
def report(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Backtest; else the last.")] = None,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open it in the browser; default at a terminal.")
    ] = None,
) -> None:
    """Render the HTML report of a run and open it."""
    from recur.pipeline.report import write_report
    from recur.storage.runs import open_run

    state: State = ctx.obj
    folder = open_run(state.home, run or _latest_backtest(state.home))
    if folder.run_id.startswith("sentiment-"):
        raise UsageError(
            f"Run {folder.run_id} is a sentiment model: a report shows forecasts of prices.",
            f"'recur sentiment --evaluate FILE --run {folder.run_id}' judges it; {folder.path / 'metrics.json'} holds its"
            " metrics.",
        )
    path = write_report(folder).resolve()
    state.result({"path": str(path)}, lambda: print(path))
    if show if show is not None else sys.stdout.isatty() and not state.json:
        import webbrowser

        webbrowser.open(path.as_uri())


@sandbox_app.command("serve")
def sandbox_serve(
    ctx: typer.Context,
    replay: Annotated[
        list[Path] | None, typer.Option(help="File of candles or funding to serve; repeat.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated market.")] = 0,
    signal: Annotated[
        float, typer.Option(help="Planted skill: correlation with the next hour's return.")
    ] = 0.0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = SANDBOX_PORT,
    now: Annotated[str | None, typer.Option(metavar="TIME", help="The venue's time at the start.")] = None,
    speed: Annotated[
        float, typer.Option(min=0.0, help="Pace of that time: 0 stands still, 1 is real.")
    ] = 1.0,
    since: Annotated[str, typer.Option(metavar="TIME", help="Begin of the generated market.")] = "2024-01-01",
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="End of the generated market; default a week from now.")
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What goes wrong, as TOML or JSON; see docs/sandbox.md."),
    ] = None,
    latency_ms: Annotated[int, typer.Option(min=0, help="Each reply comes so much later.")] = 0,
    enforce_limit: Annotated[
        bool, typer.Option("--enforce-limit", help="Ban who asks more than 600 times in 5 seconds.")
    ] = False,
) -> None:
    """Serve a generated or replayed market on this computer until Ctrl-C."""
    from recur.connectors.sandbox.faults import FaultPlan, read_faults
    from recur.connectors.sandbox.server import SandboxServer, VirtualClock

    state: State = ctx.obj
    plan = read_faults(faults) if faults else FaultPlan()
    start_ms, now_ms = parse_time(since), _time(now)
    end_ms = parse_time(until) if until else (now_ms or _now_ms()) + 7 * 86_400_000
    if start_ms >= end_ms:
        raise UsageError(f"--since {since} is not before the end of the market, {iso(end_ms)}.")
    if replay:
        from recur.connectors.sandbox.replay import replay_files

        world: World = replay_files(replay)
        now_ms = world.end_ms if now_ms is None else now_ms
    else:
        from recur.connectors.sandbox.generated import GeneratedMarket

        world = GeneratedMarket(seed, start_ms, end_ms, symbols=state.config().market.symbols, signal=signal)
        now_ms = (parse_time(until) if until else _now_ms()) if now_ms is None else now_ms
    server = SandboxServer(
        world, VirtualClock(now_ms, speed), port=port, enforce_limit=enforce_limit, faults=plan,
        latency_s=latency_ms / 1000,
    )  # fmt: skip
    with _until_signalled() as ended:
        try:
            url = server.start()
        except OSError as error:
            raise RecurError(
                f"Port {port} cannot be used: {error}.", "Choose another --port, or 0."
            ) from None
        try:
            state.result({"url": url, "now": iso(now_ms)}, lambda: print(url, flush=True))
            _wait_for(ended)
        finally:
            server.stop()


@contextlib.contextmanager
def _until_signalled() -> Iterator[Event]:
    """Gives an event that Ctrl-C or a polite kill sets: both are a normal end."""
    import signal
    import threading

    ended = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in signals]
    try:
        yield ended
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _wait_for(event: Event) -> None:
    while not event.wait(0.5):
        pass


@app.command()
def demo(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and faster, for a first look.")] = False,
) -> None:
    """Go the whole path against the sandbox, without network; in a temporary folder unless --home is given."""
    from recur.pipeline.demo import run_demo
    from recur.pipeline.verdict import verdict_text

    state: State = ctx.obj
    found = run_demo(state.home if state.home_given else None, progress=state.progress, quick=quick)

    def people() -> None:
        terminal.say_metrics(found["backtest"])
        terminal.say_forecasts("Newest forecasts (log returns)", found["forecasts"])
        print(verdict_text(found["backtest"]))
        print(
            "The market is SIMULATED: its truth is known, and none of this says anything about a real market."
        )
        for horizon, best in found["backtest"]["oracle"].items():
            share = best["share"]
            print(
                f"  h={horizon}: {best['text']}" + ("" if share is None else f", {100 * share:.0f} % of it.")
            )
        print(f"{found['seconds']['all']:.0f} s. Store and runs: {found['home']}")
        print(f"Report: {found['report']}")

    state.result(found, people)


@app.command()
def doctor(
    ctx: typer.Context,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the venue.")] = False,
    base_url: BaseUrl = None,
    archive: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Compare stored bars with these trade files of the venue instead."),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="More files for --archive.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Clear up after crashes, and check every row.")
    ] = False,
) -> None:
    """Check the installation: versions, GPU, disk, store, venue and clock. Exit 1 when a check fails.

    --archive rebuilds bars from trades and exits 4 when a stored bar differs; --repair never removes a stored row.
    """
    state: State = ctx.obj
    config = state.config(fetch__base_url=base_url)
    if more and not archive:
        raise UsageError(f"doctor takes no argument '{more[0]}'.", "Give trade files as --archive FILE...")
    if archive:
        return _doctor_archive(state, config, [*archive, *(more or [])])
    if repair:
        return _doctor_repair(state, config)
    from recur.pipeline.doctor import checks as all_checks

    checks = all_checks(state.home, state.store(config), config.fetch.base_url, offline=offline)
    ok = all(passed for _, passed, _ in checks)
    document = {
        "ok": ok,
        "checks": [dict(zip(("name", "ok", "detail"), check, strict=True)) for check in checks],
    }
    state.result(
        document,
        lambda: terminal.table(
            "Checks", ["check", "", "detail"], [(n, "ok" if k else "FAILED", d) for n, k, d in checks]
        ),
    )
    if not ok:
        raise typer.Exit(1)


def _doctor_archive(state: State, config: Config, files: Sequence[Path]) -> None:
    from recur.pipeline.archive import check_archives

    found = check_archives(state.store(config), files)

    def people() -> None:
        columns = ["series", "bars", "equal", "differing", "absent"]
        for file in found["files"]:
            title = f"{file['file']}: {file['trades']:,} trades, {file['since']} to {file['until']}"
            terminal.table(title, columns, ([row[key] for key in columns] for row in file["series"]))
        shown = found["differences"][:20]
        if shown:
            title = f"The first {len(shown)} of {len(found['differences'])} differences (--json lists all)"
            terminal.table(title, list(shown[0]), (list(row.values()) for row in shown))

    state.result(found, people)
    if not found["ok"]:
        raise typer.Exit(CheckFailed.exit_code)


def _doctor_repair(state: State, config: Config) -> None:
    from recur.pipeline.repair import repair

    found = repair(state.home, state.store(config), _now_ms())
    state.result(
        found,
        lambda: terminal.table("Repair", ["", ""], ([k, terminal.to_json(v)] for k, v in found.items())),
    )
    if not found["ok"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
