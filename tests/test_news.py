"""News: hostile and sloppy feeds, files, editions of an item, and one story told by two sources."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.connectors import announcements
from recur.connectors.cleantext import clean, latin_share
from recur.connectors.feeds import MAX_BYTES, download, read_feed
from recur.connectors.language import UNKNOWN, language_of
from recur.connectors.newsfiles import read_news
from recur.connectors.sandbox.faults import Rule
from recur.connectors.sandbox.generated import GeneratedMarket
from recur.pipeline.imports import import_file
from recur.pipeline.news import fetch_announcements, put_items
from recur.storage.store import Store
from recur.vocabulary import DAY_MS, UsageError, VenueError, VenueRefused, VenueUnreachable, parse_time
from tests.venue import END, START, Venue, hurried
from tests.venue import NOW as SANDBOX_NOW

NOW = parse_time("2025-03-10T12:00:00")
URL = "https://news.example/rss"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _rss(*items: str) -> bytes:
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>t</title>{"".join(items)}</channel></rss>'.encode()


def _item(title: str, date: str = "Mon, 10 Mar 2025 09:30:15 GMT", guid: str = "1", body: str = "") -> str:
    return (
        f"<item><title>{title}</title><guid>{guid}</guid><pubDate>{date}</pubDate>"
        f"<link>https://news.example/{guid}</link><description><![CDATA[{body}]]></description></item>"
    )


def test_an_rss_item_becomes_a_dated_row() -> None:
    (row,) = read_feed(_rss(_item("Bitcoin rises +5.2%", body="<p>Big <b>day</b></p>")), URL, NOW).to_dicts()
    assert row["published_at"] == datetime(2025, 3, 10, 9, 30, 15, tzinfo=UTC)
    assert row["published_precision"] == "s"
    assert row["title"] == "Bitcoin rises +5.2%"
    assert row["body"] == "Big day"
    assert row["url"] == "https://news.example/1"
    assert row["source"] == "news.example"


def test_an_atom_item_with_a_zone_is_put_into_utc() -> None:
    feed = b"""<feed xmlns="http://www.w3.org/2005/Atom"><entry><title>Ether</title><id>x</id>
    <updated>2025-03-10T10:00:00+02:00</updated></entry></feed>"""
    (row,) = read_feed(feed, URL, NOW).to_dicts()
    assert row["published_at"] == datetime(2025, 3, 10, 8, 0, tzinfo=UTC)


def test_a_date_without_a_time_is_of_day_precision() -> None:
    (row,) = read_feed(_rss(_item("A day", date="2025-03-09")), URL, NOW).to_dicts()
    assert row["published_precision"] == "day"


def test_an_undated_item_counts_as_published_when_it_was_seen() -> None:
    (row,) = read_feed(_rss(_item("Undated", date="soon")), URL, NOW).to_dicts()
    assert row["published_at"] == datetime(2025, 3, 10, 12, 0, tzinfo=UTC)


def test_a_feed_that_declares_entities_is_refused() -> None:
    bomb = b'<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + _rss(_item("&x;"))
    with pytest.raises(VenueError, match="declares entities"):
        read_feed(bomb, URL, NOW)


@pytest.mark.parametrize("body", [b"", b"<html><body>hello</body></html>", b"\x00\xff\xfe", b"{}"])
def test_what_is_no_feed_is_refused_in_one_line(body: bytes) -> None:
    with pytest.raises(VenueError, match="neither RSS nor Atom"):
        read_feed(body, URL, NOW)


def test_an_item_without_text_is_left_out_and_a_script_address_is_dropped() -> None:
    empty = "<item><title> </title><guid>2</guid></item>"
    bad = "<item><title>Real words here</title><guid>3</guid><link>javascript:alert(1)</link></item>"
    (row,) = read_feed(_rss(empty, bad), URL, NOW).to_dicts()
    assert (row["title"], row["url"]) == ("Real words here", None)


def test_markup_scripts_and_control_characters_are_removed_and_meaning_is_kept() -> None:
    assert clean("<p>BTC&nbsp;&amp; <b>ETH</b></p><script>steal()</script> up", 100) == "BTC & ETH up"
    assert clean("a\u202eb\x00c\x1b[31m", 100) == "abc[31m"
    assert clean("$BTC +5.2% NOT good 🚀👩‍💻", 100) == "$BTC +5.2% NOT good 🚀👩‍💻"
    assert clean("3 < 5 and 7 > 2", 100) == "3 < 5 and 7 > 2"
    assert clean(None, 100) == ""


def test_a_long_text_is_cut_between_words() -> None:
    assert clean("alpha beta gamma delta", 17) == "alpha beta gamma"
    assert len(clean("x" * 5_000_000, 20_000)) == 20_000


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_cleaning_twice_is_cleaning_once_and_leaves_nothing_unprintable(text: str) -> None:
    once = clean(text, 500)
    assert not any(c < " " or c == "\x7f" for c in once)
    if "<" not in once and "&" not in once:
        assert clean(once, 500) == once


def test_the_share_of_latin_letters_tells_scripts_apart() -> None:
    assert latin_share("Bitcoin größer") == 1.0
    assert latin_share("比特币上涨") == 0.0
    assert latin_share("123 $") == 1.0


def test_another_script_is_left_out_and_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    frame = read_feed(_rss(_item("Bitcoin rises again today"), _item("比特币价格上涨", guid="2")), URL, NOW)
    done = put_items(store, frame, source=URL, now_ms=NOW, languages=("en",))
    assert (done["items"], done["other_language"], done["new"]) == (2, 1, 1)


def test_another_language_of_the_same_script_is_left_out_and_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    titles = ("Bitcoin falls below $60,000", "Ethereum : les frais en forte baisse", "BTC ETH SOL pump")
    feed = _rss(*(_item(title, guid=title) for title in titles))
    done = put_items(store, read_feed(feed, URL, NOW), source=URL, now_ms=NOW, languages=("en",))
    assert (done["items"], done["other_language"], done["new"]) == (3, 1, 2)
    assert sorted(store.news()["title"]) == ["BTC ETH SOL pump", "Bitcoin falls below $60,000"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Furto di 200 milioni di dollari", "it"),
        ("Krypto-Betrug: Polizei warnt vor falschen Plattformen", "de"),
        ("Indonesia larang aset kripto", "id"),
        ("비트코인 급락", "ko"),
        ("THE FED HOLDS RATES STEADY AS INFLATION COOLS", "en"),
        ("XRP", UNKNOWN),
        ("", UNKNOWN),
        ("SEC processa a Binance", UNKNOWN),  # four languages could have written it
    ],
)
def test_a_language_is_told_only_when_it_is_certain(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_language_that_nobody_has_learned_leaves_all_in() -> None:
    assert language_of("Furto di 200 milioni di dollari", ["xx"]) == UNKNOWN


def test_an_edited_item_is_a_version_and_a_repeated_reading_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = read_feed(_rss(_item("Exchange halts withdrawals")), URL, NOW)
    edited = read_feed(_rss(_item("Exchange resumes withdrawals")), URL, NOW)
    put = [
        put_items(store, frame, source=URL, now_ms=NOW + k, languages=("en",))
        for k, frame in enumerate((first, first, edited))
    ]
    assert [(p["new"], p["changed"], p["same"]) for p in put] == [(1, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert store.news()["title"].to_list() == ["Exchange resumes withdrawals"]
    assert store.news(as_of_ms=NOW + 1)["title"].to_list() == ["Exchange halts withdrawals"]


def test_the_same_story_from_two_sources_is_one_story(tmp_path: Path) -> None:
    store = Store(tmp_path)
    a = _rss(_item("SEC approves the first spot Bitcoin ETF in the US", guid="a"))
    b = _rss(
        _item("First spot Bitcoin ETF in the US approves: the SEC", "Mon, 10 Mar 2025 11:00:00 GMT", "b"),
        _item("SEC approves the second spot Ether ETF of Asia", "Mon, 10 Mar 2025 11:00:00 GMT", "c"),
    )
    put_items(store, read_feed(a, URL, NOW), source="a", now_ms=NOW, languages=("en",))
    done = put_items(
        store, read_feed(b, "https://b.example/f", NOW), source="b", now_ms=NOW, languages=("en",)
    )
    assert done["repeats"] == 1
    first, repeat, other = store.news().sort("title")["story_id"].gather([1, 0, 2]).to_list()
    assert first == repeat != other


def test_a_headline_that_is_the_lead_of_another_item_is_the_same_story(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lead = "The regulator has approved a spot fund for the first time on Monday"
    feed = _rss(_item("A fund at last", guid="a", body=lead), _item(lead, guid="b"))
    done = put_items(store, read_feed(feed, URL, NOW), source="a", now_ms=NOW, languages=("en",))
    assert (done["new"], done["repeats"]) == (2, 1)


def test_other_numbers_are_another_story(tmp_path: Path) -> None:
    store = Store(tmp_path)
    feed = _rss(
        _item("Bitcoin falls 5% in a single hour", guid="a"),
        _item("Bitcoin falls 6% in a single hour", guid="b"),
    )
    done = put_items(store, read_feed(feed, URL, NOW), source="a", now_ms=NOW, languages=("en",))
    assert (done["new"], done["repeats"]) == (2, 0)


def test_a_story_is_told_only_by_what_came_before_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    late = _rss(_item("Miners sell their reserves in haste", "Mon, 10 Mar 2025 11:00:00 GMT", "late"))
    early = _rss(_item("Miners sell their reserves in haste", "Mon, 10 Mar 2025 08:00:00 GMT", "early"))
    for feed in (late, early):
        put_items(store, read_feed(feed, URL, NOW), source="a", now_ms=NOW, languages=("en",))
    assert store.news()["story_id"].n_unique() == 2  # the later one stood alone when it was told


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/huge":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(MAX_BYTES // 65_536 + 10):
                    self.wfile.write(b" " * 65_536)
            except OSError:
                self.close_connection = True
        else:
            self.send_response(int(self.path[1:]))
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_huge_feed_is_given_up(site: str) -> None:
    with pytest.raises(VenueError, match="larger than 5,000,000 bytes"):
        download(f"{site}/huge")


def test_feeds_that_fail_say_how(site: str) -> None:
    with pytest.raises(VenueRefused, match="HTTP status 404"):
        download(f"{site}/404")
    with pytest.raises(VenueUnreachable, match="HTTP status 503"):
        download(f"{site}/503")
    with pytest.raises(VenueUnreachable, match="no answer"):
        download("http://127.0.0.1:9/rss", timeout_s=0.5)


def test_a_news_file_is_read_with_midnight_as_a_date(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text(
        "text,published_at,url\nFirst,2024-01-05T00:00:00Z,\nSecond,2024-01-05T10:20:00Z,https://x.y/1\n"
    )
    frame = read_news(path)
    assert frame["published_precision"].to_list() == ["day", "minute"]
    done = import_file(Store(tmp_path / "home"), path, category="linear", languages=("en",), now_ms=NOW)
    assert (done["new"], done["same"]) == (2, 0)
    assert Store(tmp_path / "home").news()["backfill"].to_list() == [True, True]


def test_a_news_file_that_does_not_fit_is_refused_with_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text(
        "title,published_at\nFine,2024-01-05T10:00:00Z\n,2024-01-05T10:00:00Z\nTimeless,whenever\n"
    )
    with pytest.raises(UsageError, match="row 2: no text; row 3: published_at is missing"):
        read_news(path)
    path.write_text("title,when\na,b\n")
    with pytest.raises(UsageError, match="missing column published_at"):
        read_news(path)


@pytest.mark.skipif(not DATA.exists(), reason="the real news files are not here")
def test_the_date_only_items_of_the_real_file_are_told() -> None:
    frame = read_news(DATA / "news_bitcoin_2021_2024.parquet")
    counts = frame.group_by("published_precision").len().to_dict(as_series=False)
    assert dict(zip(*counts.values(), strict=True))["day"] >= 1_000
    assert frame.filter(pl.col("published_at").dt.year() == 2024)[
        "published_precision"
    ].unique().to_list() == ["day"]


def test_announcements_are_read_until_only_known_ones_come_though_the_list_moves() -> None:
    shown = [{"url": f"https://a/blt{k:016x}/", "title": str(k)} for k in range(50, 0, -1)]
    asked: list[int] = []

    def ask(page: int) -> list[announcements.Row]:
        asked.append(page)
        if len(asked) == 2:  # a new one appears between page 1 and 2
            shown.insert(0, {"url": "https://a/blt00000000000000ff/", "title": "new"})
        return list(shown[(page - 1) * 20 : page * 20])

    known = {announcements.key_of(row) for row in shown[30:]}
    rows = announcements.read_pages(ask, lambda row: announcements.key_of(row) in known)
    titles = {row["title"] for row in rows}
    assert {str(k) for k in range(50, 20, -1)} | {"new"} <= titles
    assert asked == [1, 2, 3, 1]


def test_an_announcement_is_dated_by_its_publication_not_by_its_author() -> None:
    row = {"title": "Delisting of X", "url": "https://a/blt0123456789abcdef", "dateTimestamp": NOW + 10**9}
    (item,) = announcements.as_items([row], NOW)
    assert item["published_ms"] == NOW
    (item,) = announcements.as_items([{**row, "publishTime": NOW - 5}], NOW)
    assert (item["published_ms"], item["key"]) == (NOW - 5, "blt0123456789abcdef")


@pytest.fixture(scope="module")
def venue() -> Iterator[Venue]:
    market = GeneratedMarket(3, START, END, symbols=("BTCUSDT",), base_interval="1h")
    with Venue(market).server as server:
        there = Venue(market)
        there.server = server
        yield there


def test_announcements_are_fetched_once_and_then_only_what_is_new(venue: Venue, tmp_path: Path) -> None:
    venue.heals()
    store, connector = Store(tmp_path), hurried(venue.server.base_url)
    first = fetch_announcements(store, connector, "en-US")
    truth = {a.slug for a in venue.market.announcements() if a.published_ms <= SANDBOX_NOW}
    assert first["new"] == store.news().height == len(truth) > 40
    venue.server.clock.set(SANDBOX_NOW + 5 * DAY_MS)
    second = fetch_announcements(store, connector, "en-US")
    later = {a.slug for a in venue.market.announcements() if a.published_ms <= SANDBOX_NOW + 5 * DAY_MS}
    assert second["new"] == len(later) - len(truth) > 0
    assert fetch_announcements(store, connector, "en-US")["new"] == 0
    assert store.news()["source"].unique().to_list() == ["bybit announcements"]


@pytest.mark.parametrize(
    "fault", ["announcement-inserted", "announcement-dated-ahead", "publish-time-missing", "tags-localised"]
)
def test_a_moving_or_careless_list_of_announcements_loses_no_item(
    venue: Venue, tmp_path: Path, fault: str
) -> None:
    venue.heals()
    connector = hurried(venue.server.base_url)
    fetch_announcements(Store(tmp_path / "calm"), connector, "en-US")
    calm = Store(tmp_path / "calm").news()
    venue.suffers(Rule(fault, "/v5/announcements/index"))
    fetch_announcements(Store(tmp_path / "rough"), connector, "en-US")
    rough = Store(tmp_path / "rough").news()
    assert set(calm["url"]) <= set(rough["url"])
    assert all(int(t.timestamp() * 1000) <= SANDBOX_NOW for t in rough["published_at"])


def test_a_title_edited_under_the_same_address_is_a_version(venue: Venue, tmp_path: Path) -> None:
    venue.heals()
    store, connector = Store(tmp_path), hurried(venue.server.base_url)
    fetch_announcements(store, connector, "en-US")
    before = store.news().height
    venue.suffers(Rule("announcement-edited", "/v5/announcements/index"))
    done = fetch_announcements(store, connector, "en-US")
    assert (done["new"], store.news().height) == (0, before)
    assert done["changed"] >= 1
    assert store.news_versions().height == before + done["changed"]
