"""``report.html``: one page that tells what a run is worth, without a script and without a request to anywhere.

    manifest.json, metrics.json ─┐
    predictions.parquet          ├─▶ sections (HTML text and inline SVG) ─▶ report.html
    equity, cum_difference ──────┘

Every part may be absent: the page then says so in a sentence. Every string of a run is escaped.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recur.pipeline import figures, pieces
from recur.pipeline.metrics import LEVELS
from recur.storage.runs import RunFolder

MAX_BYTES = 1_500_000
FAN_CUTOFFS = 72
_FAN_SERIES = (12, 4, 0)
_WORDS = {"none": "no skill", "weak": "weak skill", "strong": "strong skill"}
Json = dict[str, Any]


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a run, whole or not at all, and return its path.

    A run whose metrics have no ``forecast`` part gets the short page of a training run. Raises DataMissing when the
    manifest is absent, or when it or metrics.json is broken.
    """
    manifest = folder.read_manifest()
    metrics = folder.read_json("metrics.json") if folder.metrics.exists() else {}
    page = ""
    for n_series in _FAN_SERIES:
        page = _page(folder, manifest, metrics, n_series)
        if len(page.encode()) <= MAX_BYTES:
            break
    return folder.write_text("report.html", page)


def _page(folder: RunFolder, manifest: Json, metrics: Json, n_series: int) -> str:
    if "forecast" in metrics:
        kind, parts = "Backtest", _backtest(folder, metrics, n_series)
    else:
        kind, parts = "Training", _training(metrics)
    parts.append(("Configuration and manifest", _origin(folder, manifest)))
    model = metrics.get("model") or manifest.get("model") or ""
    simulated = any(part.get("simulated") is True for part in (metrics, manifest)) or bool(
        metrics.get("oracle")
    )
    banner = (
        '<p class="banner" role="note"><strong>This market is simulated.</strong> No price on this page was ever '
        "traded: nothing here says anything about a real market.</p>"
        if simulated
        else ""
    )
    links = " · ".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(parts))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(n)}</h2>{html}</section>' for i, (n, html) in enumerate(parts)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(folder.run_id)}</title><style>{pieces.CSS}</style></head><body><main><header>"
        f'<p class="kind">{kind} report</p><h1>{escape(str(model)) or "unnamed model"}</h1>'
        f'<p class="run">{escape(str(metrics.get("run_id") or folder.run_id))}</p></header>{banner}'
        f"<nav>{links}</nav>{body}<footer><p>Made by recur. All times are UTC. Annualised numbers use 365 days. "
        "A record of past skill is no promise of future skill, and nothing here is investment advice.</p>"
        "</footer></main></body></html>\n"
    )


def _backtest(folder: RunFolder, metrics: Json, n_series: int) -> list[tuple[str, str]]:
    parts = [
        ("Verdict", _verdict(metrics)),
        ("Skill against the baselines", _skill(metrics)),
        ("Calibration", _calibration(metrics)),
        ("Skill over time", _over_time(folder, metrics)),
        ("Newest forecasts", _fans(folder, metrics, n_series)),
        ("Trading after costs", _trading(folder, metrics)),
        ("Folds", _folds(metrics)),
    ]
    if metrics.get("oracle"):
        parts.insert(2, ("What was attainable", _oracle(metrics)))
    return parts


# ---------------------------------------------------------------- the words and tables of each section


def _verdict(metrics: Json) -> str:
    verdict = pieces.as_dict(metrics.get("verdict"))
    word = str(verdict.get("skill", ""))
    text = str(verdict.get("text") or "The run holds no verdict.")
    colour = word if word in _WORDS else "none"
    tiles = []
    for h, part in _horizons(metrics)[:4]:
        name, best = _strongest(part)
        if name:
            what = f"CRPS skill {_interval(best)}, {_ahead(h, metrics)}, against {name}, the strongest baseline there"
            tiles.append((pieces.signed(best.get("crps_skill")), what))
    for h, part in _horizons(metrics)[:1]:
        tiles.append(
            (
                pieces.percent(part.get("coverage_90")),
                f"of outcomes inside the 90 % band, {_ahead(h, metrics)}",
            )
        )
    trading = pieces.as_dict(metrics.get("trading"))
    if pieces.as_float(trading.get("net_sharpe")) is not None:
        hold = pieces.number(trading.get("buy_hold_sharpe"), ".2f")
        tiles.append(
            (pieces.number(trading["net_sharpe"], ".2f"), f"Sharpe ratio after costs (buy and hold: {hold})")
        )
    tiles.append(
        (
            pieces.number(metrics.get("n_forecasts"), ",.0f"),
            f"forecasts of {len(pieces.as_list(metrics.get('series')))} series",
        )
    )
    return (
        f'<p class="verdict {colour}"><span>{escape(_WORDS.get(word, word)) or "no verdict"}</span> {escape(text)}</p>'
        f'<div class="tiles">{"".join(f"<div><b>{escape(v)}</b><small>{escape(t)}</small></div>" for v, t in tiles)}'
        "</div>"
    )


def _skill(metrics: Json) -> str:
    oracle, rows, lines, summary = pieces.as_dict(metrics.get("oracle")), [], [], []
    for h, part in _horizons(metrics):
        for name, base in pieces.as_dict(part.get("baselines")).items():
            base = pieces.as_dict(base)
            skill = pieces.as_float(base.get("crps_skill"))
            low, high = (
                pieces.as_float(base.get("crps_skill_low")),
                pieces.as_float(base.get("crps_skill_high")),
            )
            lines.append(
                [_ahead(h, metrics), name, pieces.number(base.get("crps"), ".3e"), pieces.signed(skill), _interval(base) or "–",
                 pieces.number(base.get("qlike_diff"), "+.4f"), pieces.number(base.get("dm_stat"), ".2f"), pieces.p_value(base.get("dm_p"))]
            )  # fmt: skip
            if skill is not None:
                best = (
                    pieces.as_float(pieces.as_dict(oracle.get(h)).get("crps_skill"))
                    if name == "ewma"
                    else None
                )
                rows.append(figures.Interval(_ahead(h, metrics), name, skill, low, high, best))
        summary.append(
            [_ahead(h, metrics), pieces.number(part.get("n"), ",.0f"), pieces.number(part.get("crps"), ".3e"),
             pieces.number(part.get("qlike"), ".3f"), pieces.number(part.get("ic"), "+.3f"), pieces.number(part.get("rank_ic"), "+.3f"),
             pieces.number(part.get("auc"), ".3f")]
        )  # fmt: skip
    if not lines and not summary:
        return pieces.absent("metrics.json holds no scores by horizon.")
    out = ""
    if rows:
        note = (
            "Skill is 1 − CRPS of the model ÷ CRPS of the baseline, on exactly the same rows. Lines are 95 % block "
            "bootstrap intervals over time. Blue: the whole interval is above zero; orange: below; grey: undecided, "
            "or without an interval."
        )
        if any(row.attainable is not None for row in rows):
            note += " Diamonds: the skill that the simulated market's own law reaches against ewma."
        out += pieces.figure(figures.forest(rows), note)
    else:
        out += pieces.absent("No baseline was scored in this run, so no skill can be stated.")
    if lines:
        out += pieces.table(
            ["Horizon", "Baseline", "its CRPS", "Skill", "95 % interval", "QLIKE diff.", "DM stat.", "DM p"], lines,
            "CRPS in log-return units, computed from 19 quantiles as twice the mean pinball loss. QLIKE difference "
            "(volatility forecast) in nats, ours minus theirs: negative favours the model. Diebold–Mariano on CRPS "
            "with HAC variance and the Harvey–Leybourne–Newbold correction, two-sided: negative favours the model. "
            "With many baselines and horizons some small p arise by chance alone; p is not corrected for that.",
            left=2,
        )  # fmt: skip
    out += pieces.table(
        ["Horizon", "Forecasts", "CRPS", "QLIKE", "IC", "Rank IC", "AUC"], summary,
        "The model itself. IC: correlation of mean forecast and realised return; AUC: of the direction (0.5: a coin). "
        "A dash means that the number does not exist, as for a model that forecasts no direction.",
    )  # fmt: skip
    return out + _by_series(metrics)


def _by_series(metrics: Json) -> str:
    names: list[str] = []
    for _, part in _horizons(metrics):
        for scores in pieces.as_dict(part.get("by_series")).values():
            names += [name for name in pieces.as_dict(scores) if name not in names]
    rows = [
        [series, _ahead(h, metrics), *(pieces.signed(pieces.as_dict(scores).get(name)) for name in names)]
        for h, part in _horizons(metrics)
        for series, scores in pieces.as_dict(part.get("by_series")).items()
    ]
    if not rows:
        return pieces.absent("Skill by series was not recorded.")
    note = "CRPS skill of each series by itself. One series is less evidence than all of them."
    return f"<details><summary>Skill by series</summary>{pieces.table(['Series', 'Horizon', *names], rows, note, 2)}</details>"


def _oracle(metrics: Json) -> str:
    entries = pieces.as_dict(metrics.get("oracle"))
    keys = sorted(entries, key=_order)
    rows = [
        [
            _ahead(h, metrics),
            pieces.signed(pieces.as_dict(entries[h]).get("crps_skill")),
            pieces.percent(pieces.as_dict(entries[h]).get("share")),
        ]
        for h in keys
    ]
    texts = dict.fromkeys(str(pieces.as_dict(entries[h]).get("text") or "") for h in keys)
    return "".join(f"<p>{escape(text)}</p>" for text in texts if text) + pieces.table(
        ["Horizon", "Attainable skill", "Share reached by the model"], rows,
        "The law of a simulated market is known, so the best possible forecast is too. Skill against ewma.",
    )  # fmt: skip


def _calibration(metrics: Json) -> str:
    levels, pictures = pieces.as_dict(metrics.get("pit_levels")), []
    for h in sorted(levels, key=_order):
        shares = [pieces.as_float(v) for v in pieces.as_list(levels[h])]
        if len(shares) == len(LEVELS) and None not in shares:
            pictures.append(
                figures.calibration(LEVELS.tolist(), [v or 0.0 for v in shares], _ahead(h, metrics))
            )
    out = (
        pieces.figure(
            f'<div class="grid small">{"".join(pictures)}</div>',
            "Share of outcomes below each forecast quantile. On the dashed diagonal a forecast means what it says; a "
            "line that starts above it and ends below it comes from bands that are too narrow.",
        )
        if pictures
        else pieces.absent(
            "The share of outcomes below each quantile was not recorded, so there is no calibration plot."
        )
    )
    rows = [
        [
            _ahead(h, metrics),
            pieces.percent(p.get("coverage_50")),
            pieces.percent(p.get("coverage_90")),
            pieces.number(p.get("pit_ks"), ".3f"),
        ]
        for h, p in _horizons(metrics)
    ]
    return out + pieces.table(
        ["Horizon", "in the 50 % band", "in the 90 % band", "PIT KS"], rows,
        "A calibrated forecast has 50 % and 90 % here. PIT KS: largest distance from the diagonal (0: none).",
    )  # fmt: skip


def _over_time(folder: RunFolder, metrics: Json) -> str:
    frame, problem = _read(folder.path / "cum_difference.parquet", ["time", "horizon", "ewma"])
    if frame is None or not frame.height:
        return pieces.absent(problem or "cum_difference.parquet is empty.")
    curves = {}
    for h in sorted(frame["horizon"].drop_nulls().unique().to_list(), key=lambda v: _order(str(v))):
        part = frame.filter(pl.col("horizon") == h).sort("time")
        values = _floats(part["ewma"])
        if np.isfinite(values).any():
            curves[_ahead(str(h), metrics)] = (_days(part["time"]), values)
    if not curves:
        return pieces.absent("The loss difference to ewma was recorded without a number in it.")
    return pieces.figure(
        figures.difference(curves),
        "CRPS of the model minus that of ewma, summed up over the test time. A steady fall is skill that "
        "lasts; a single drop is luck or one event; a rise is time in which ewma was better.",
    )


_PREDICTION_COLUMNS = [
    "unique_id",
    "cutoff",
    "ds",
    "horizon",
    "q05",
    "q25",
    "q50",
    "q75",
    "q95",
    "close",
    "actual",
]


def _fans(folder: RunFolder, metrics: Json, n_series: int) -> str:
    frame, problem = _read(folder.predictions, _PREDICTION_COLUMNS, metrics.get("model"))
    if frame is None or not frame.height:
        return pieces.absent(problem or "predictions.parquet is empty.")
    newest = frame.filter(pl.col("cutoff").rank("dense", descending=True).over("unique_id") <= FAN_CUTOFFS)
    names = sorted(str(name) for name in newest["unique_id"].drop_nulls().unique())
    out = ""
    for name in names[:n_series]:
        rows = newest.filter(pl.col("unique_id") == name).unique(["cutoff", "horizon"], keep="last")
        out += _one_series(name, rows.sort("cutoff", "horizon"), metrics)
    if len(names) > n_series:
        out += pieces.absent(f"Shown are {n_series} of {len(names)} series, to keep the page small.")
    return out


def _one_series(name: str, rows: pl.DataFrame, metrics: Json) -> str:
    history = rows.unique("cutoff", keep="first").sort("cutoff")
    last = rows.filter(pl.col("cutoff") == rows["cutoff"].max()).sort("horizon")
    quantiles = np.column_stack([_floats(last[q]) for q in ("q05", "q25", "q50", "q75", "q95")])
    good = np.isfinite(quantiles).all(axis=1)
    prices = _floats(history["close"])
    first = rows.filter(pl.col("horizon") == rows["horizon"].min())
    band = figures.Band(
        name, _days(first["ds"]), _floats(first["q05"]), _floats(first["q95"]), _floats(first["actual"])
    )
    left = pieces.absent(f"{name}: the last cutoff has no price or no quantiles, so there is no fan.")
    if good.any() and np.isfinite(prices[-1]):
        left = figures.fan(
            figures.Fan(
                name, _days(history["cutoff"]), prices, _days(last["ds"])[good], quantiles[good],
                _floats(last["actual"])[good],
            )
        )  # fmt: skip
    right = figures.band(band, _ahead(str(first["horizon"][0]), metrics))
    known, outside = int(np.isfinite(band.actual).sum()), int(band.outside.sum())
    return pieces.figure(
        f'<div class="grid">{left}{right}</div>',
        f"{name}. Left: price at the last {history.height} cutoffs, and the 50 % and 90 % bands from the last one "
        f"(straight between horizons). Right: 90 % band of the shortest horizon against what happened; {outside} of "
        f"{known} outcomes lie outside, {0.1 * known:.0f} are to be expected.",
    )


def _trading(folder: RunFolder, metrics: Json) -> str:
    trading = pieces.as_dict(metrics.get("trading"))
    if not any(pieces.as_float(v) is not None for v in trading.values()):
        return pieces.absent("No trading was simulated in this run.")
    frame, problem = _read(folder.path / "equity.parquet", ["time"])
    curves: dict[str, NDArray[np.float64]] = {}
    if frame is not None:
        for key in ("net", "gross", "buy_hold"):
            if key in frame.columns and np.isfinite(values := _floats(frame[key])).any():
                curves[key] = values
    out = pieces.absent(problem or "equity.parquet holds no numbers, so there is no equity curve.")
    if frame is not None and curves:
        out = pieces.figure(
            figures.equity(_days(frame["time"]), curves),
            "Simulated, on past prices: no order was ever sent. Market impact and failed orders are not part of it.",
        )
    h = trading.get("trade_horizon")
    out += pieces.table(
        ["Result", "Value"],
        [["Horizon that is traded", _ahead(str(h), metrics) if h is not None else "–"],
         ["Sharpe ratio before costs", pieces.number(trading.get("gross_sharpe"), ".2f")],
         ["Sharpe ratio after costs", pieces.number(trading.get("net_sharpe"), ".2f")],
         ["Sharpe ratio of buy and hold", pieces.number(trading.get("buy_hold_sharpe"), ".2f")],
         ["Deflated Sharpe ratio", pieces.number(trading.get("deflated_sharpe"), ".3f")],
         ["Trials counted in deflating", pieces.number(trading.get("n_trials"), ",.0f")],
         ["Net return", pieces.percent(trading.get("net_return"))],
         ["Maximum drawdown", pieces.percent(trading.get("max_drawdown"))]],
        f"Sharpe ratios are annualised with 365 days ({pieces.number(trading.get('bars_per_year'), ',.0f')} bars a year). The "
        "deflated ratio is the probability that the true one exceeds what so many trials find by luck.",
    )  # fmt: skip
    return out + pieces.table(
        ["Cost", "Amount"],
        [["Fees", f"{pieces.percent(trading.get('fees'), 2)} at {pieces.number(trading.get('fee_bps'), 'g')} bps per traded value"],
         ["Slippage", f"{pieces.percent(trading.get('slippage'), 2)} at {pieces.number(trading.get('slippage_bps'), 'g')} bps"],
         ["Funding", pieces.percent(trading.get("funding"), 2)],
         ["Turnover per day", pieces.number(trading.get("turnover"), ",.2f")],
         ["Break-even cost", f"{pieces.number(trading.get('break_even_bps'), '.2f')} bps per traded value"]],
        "Sums over the test time as a share of capital; a positive amount lowers the net return. Above the break-even "
        "cost the simulated trading loses money.",
    )  # fmt: skip


def _folds(metrics: Json) -> str:
    folds = [pieces.flat(pieces.as_dict(fold)) for fold in pieces.as_list(metrics.get("folds"))]
    names = list(dict.fromkeys(name for fold in folds for name in fold))
    if not names:
        return pieces.absent("The bounds of the folds were not recorded.")
    rows = [[str(i + 1), *(fold.get(name, "–") for name in names)] for i, fold in enumerate(folds)]
    note = "Each fold is forecast out of sample, by a model whose training ends before the test begins. UTC."
    return pieces.table(
        ["Fold", *(name.replace("_", " ") for name in names)], rows, note, left=len(names) + 1
    )


def _training(metrics: Json) -> list[tuple[str, str]]:
    values = [
        math.nan if (v := pieces.as_float(item)) is None else v
        for item in pieces.as_list(metrics.get("val_pinball"))
    ]
    if not metrics:
        curve = pieces.absent("This run has no metrics.json: nothing was measured, or it was cut short.")
    elif not any(math.isfinite(v) for v in values):
        curve = pieces.absent("No validation loss was recorded, so there is no training curve.")
    else:
        best = int(np.nanargmin(values))
        curve = (
            f"<p>{len(values)} epochs; the lowest validation loss is {values[best]:.5f}, after epoch {best + 1}.</p>"
            + pieces.figure(
                figures.training(values),
                "Mean pinball loss on the validation time by epoch; the diamond marks the best epoch. It chose the "
                "weights, so it is no proof of skill: only a backtest is.",
            )
        )
    rest = {k: v for k, v in metrics.items() if k not in ("val_pinball", "run_id", "simulated", "oracle")}
    rows = [[name, text] for name, text in pieces.flat(rest).items()]
    return [
        ("Training", curve + (pieces.table(["Measure", "Value"], rows, "Of metrics.json.") if rows else ""))
    ]


def _origin(folder: RunFolder, manifest: Json) -> str:
    out = ""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    if folder.config.exists():
        out += pieces.collapsed("config.toml", folder.config.read_text(encoding="utf-8", errors="replace"))
    else:
        out += pieces.absent("This run has no config.toml.")
    return out + pieces.collapsed("manifest.json", text)


# ---------------------------------------------------------------- small pieces


def _read(path: Path, columns: list[str], model: object = None) -> tuple[pl.DataFrame | None, str]:
    """The frame, or None and a sentence that says why. Where several models are in it, only rows of ``model``."""
    if not path.exists():
        return None, f"This run has no {path.name}, so this part is left out."
    try:
        scan = pl.scan_parquet(path)
        there = scan.collect_schema().names()
        if missing := [name for name in columns if name not in there]:
            return None, f"{path.name} lacks {', '.join(missing)}, so this part is left out."
        if columns == ["time"]:
            return scan.sort("time").collect(), ""
        if "model" in there and model in scan.select("model").unique().collect()["model"].to_list():
            scan = scan.filter(pl.col("model") == model)
        return scan.select(columns).collect(), ""
    except (pl.exceptions.PolarsError, OSError) as error:
        return None, f"{path.name} cannot be read ({error}), so this part is left out."


def _floats(column: pl.Series) -> NDArray[np.float64]:
    return column.cast(pl.Float64).fill_null(math.nan).to_numpy().astype(np.float64)


def _days(column: pl.Series) -> NDArray[np.float64]:
    """Days since 1970 UTC of instants (or of UTC milliseconds)."""
    return _floats(column.dt.epoch("ms") if column.dtype.is_temporal() else column) / 86_400_000


def _interval(base: Json) -> str:
    low, high = pieces.as_float(base.get("crps_skill_low")), pieces.as_float(base.get("crps_skill_high"))
    return (
        ""
        if low is None or high is None
        else f"[{pieces.number(100 * low, '+.2f')}, {pieces.number(100 * high, '+.2f')}] %"
    )


def _order(text: str) -> tuple[int, float, str]:
    return (0, float(text), text) if text.isdigit() else (1, 0.0, text)


def _horizons(metrics: Json) -> list[tuple[str, Json]]:
    forecast = pieces.as_dict(metrics.get("forecast"))
    return [(h, pieces.as_dict(forecast[h])) for h in sorted(forecast, key=_order)]


def _strongest(part: Json) -> tuple[str, Json]:
    """The baseline with the lowest CRPS: equally, the one that leaves the model the least skill."""
    known = {k: pieces.as_dict(v) for k, v in pieces.as_dict(part.get("baselines")).items()}
    known = {k: v for k, v in known.items() if pieces.as_float(v.get("crps_skill")) is not None}
    if not known:
        return "", {}
    name = min(known, key=lambda k: pieces.as_float(known[k]["crps_skill"]) or 0.0)
    return name, known[name]


def _ahead(horizon: str, metrics: Json) -> str:
    """``6 bars (6 h)``: the time is given when the number of bars in a year is known."""
    words = f"{horizon} bar{'' if horizon == '1' else 's'}"
    per_year = pieces.as_float(pieces.as_dict(metrics.get("trading")).get("bars_per_year"))
    if not per_year or per_year < 0 or not horizon.isdigit():
        return words
    minutes = round(int(horizon) * 365 * 1440 / per_year)
    size, unit = next((s, u) for s, u in ((1440, "d"), (60, "h"), (1, "min")) if minutes % s == 0)
    return f"{words} ({minutes // size} {unit})"
