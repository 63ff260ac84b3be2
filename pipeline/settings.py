"""Where settings come from: defaults, TOML files in order, ``--set section.key=value``, then flags; later wins.

Where each value came from is kept (``recur -v`` prints it). Standard library only.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from recur.pipeline.config import SECTIONS, Config, ConfigProblems, MarketConfig
from recur.vocabulary import RecurError, UsageError, did_you_mean, parse_symbol

Provenance = dict[str, tuple[object, str]]
"""``"section.key"`` to (value, origin); origin is ``default``, a file path, ``--set`` or ``flag``."""

_HINTS = {
    f"{name}.{key}": hint for name, cls in SECTIONS.items() for key, hint in get_type_hints(cls).items()
}


def _from_text(hint: Any, text: str) -> object:
    """Value of a ``--set`` or flag text: commas make a list, the rest is as in TOML; text stays text."""
    text = text.strip()
    if get_origin(hint) is tuple and not text.startswith("["):
        return [_from_text(get_args(hint)[0], part) for part in text.split(",") if part.strip()]
    if hint is str and text[:1] not in ('"', "'"):
        return text
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def load_config(
    files: Sequence[Path], sets: Sequence[str], flags: Mapping[str, object]
) -> tuple[Config, Provenance]:
    """Merge ``files`` (TOML, later wins), ``sets`` (``section.key=value``) and ``flags`` (``section.key`` to value).

    Flags that are None were not given. Text for ``sets`` and ``flags`` is read by the key's type; commas make lists.
    Raises UsageError naming every unknown section or key (with a suggestion) and every bad value, in one go.
    """
    layers: list[tuple[str, object, str]] = []
    problems: list[tuple[str, str]] = []
    for path in files:
        for section, table in _read_toml(path).items():
            if not isinstance(table, dict):
                problems.append((section, f"stands outside a [section] ({path})"))
            elif section not in SECTIONS:
                problems.append((f"[{section}]", f"is unknown.{did_you_mean(section, SECTIONS)} ({path})"))
            else:
                layers += [(f"{section}.{key}", value, str(path)) for key, value in table.items()]
    for text in sets:
        key, equals, given = text.partition("=")
        if equals:
            layers.append((key.strip(), given, "--set"))
        else:
            problems.append(("--set", f"{text!r}: expected section.key=value"))
    layers += [(key, value, "flag") for key, value in flags.items() if value is not None]

    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for key, value, origin in layers:
        if key not in _HINTS:
            problems.append((key, f"is unknown.{_suggest(key)} ({origin})"))
            continue
        is_text = isinstance(value, str) and origin in ("--set", "flag")
        values[key] = _from_text(_HINTS[key], str(value)) if is_text else value
        origins[key] = origin
    _adopt_category(values, origins)
    if values.get("market.category") == "spot" and "fetch.kinds" not in values:
        values["fetch.kinds"], origins["fetch.kinds"] = ("candles",), "default for spot"

    sections: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        try:
            sections[name] = cls(**own)
        except ConfigProblems as error:
            problems += _with_origin(error, origins)
    if problems:
        raise ConfigProblems(problems)
    try:
        config = Config(**sections)
    except ConfigProblems as error:
        raise ConfigProblems(_with_origin(error, origins)) from None
    provenance: Provenance = {}
    for key in _HINTS:
        section, _, item = key.partition(".")
        provenance[key] = (getattr(getattr(config, section), item), origins.get(key, "default"))
    return config, provenance


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read the configuration {path}: {error}.", "recur init writes one."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}.", 'Text stands in quotes: interval = "1h".'
        ) from None


def _suggest(key: str) -> str:
    """A known key with the same last word in another section, or spelled much like ``key``."""
    section, _, item = key.partition(".")
    near = did_you_mean(item, [name.partition(".")[2] for name in _HINTS if name.startswith(f"{section}.")])
    if near:
        return near.replace("'", f"'{section}.", 1)
    elsewhere = [name for name in _HINTS if name.partition(".")[2] == (item or section)]
    return f" Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, _HINTS)


def _with_origin(error: ConfigProblems, origins: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, f"{what} ({origins.get(key, 'default')})") for key, what in error.problems]


def _adopt_category(values: dict[str, object], origins: dict[str, str]) -> None:
    """Take the category from ccxt spellings (``BTC/USDT:USDT``) where none was given."""
    symbols = values.get("market.symbols")
    if "market.category" in values or not isinstance(symbols, list | tuple):
        return
    try:
        found = {parse_symbol(text)[0] for text in symbols if isinstance(text, str)}
    except RecurError:
        return  # MarketConfig reports it, with the other problems
    if len(found) == 1 and found != {MarketConfig().category}:
        (values["market.category"],) = found
        origins["market.category"] = origins["market.symbols"]


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def dump_toml(config: Config) -> str:
    """The whole configuration as TOML; ``load_config`` of it gives an equal one."""
    lines = []
    for name, cls in SECTIONS.items():
        section = getattr(config, name)
        lines.append(f"[{name}]")
        lines += [f"{item.name} = {_toml_value(getattr(section, item.name))}" for item in fields(cls)]
        lines.append("")
    return "\n".join(lines)


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, from the source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for above, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(above, ast.AnnAssign)
            and isinstance(above.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[above.target.id] = str(below.value.value)
    return docs


def starter_toml() -> str:
    """The file that ``recur init`` writes: every key with its meaning and default, all commented out."""
    lines = ["# Settings of recur. A line '#key = value' shows the default: remove the # and change it.", ""]
    for name, cls in SECTIONS.items():
        lines += [f"[{name}]  # {cls.__doc__}"]
        docs, defaults = _field_docs(cls), cls()
        for item in fields(cls):
            lines += [f"# {docs[item.name]}", f"#{item.name} = {_toml_value(getattr(defaults, item.name))}"]
        lines.append("")
    return "\n".join(lines)
