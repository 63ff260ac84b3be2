"""Headlines scored per second on one core: torch's packed kernel against the one that scoring uses, taking turns.

Processor time counts, not the clock, so that other programs disturb little.

The network has the sizes of the shipped plan and random weights, which cost what trained ones cost. Run with the data
folder beside the checkout: ``python benchmarks/scoring.py [--data ../shared/data] [--rounds 7]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from common import show

from recur.models.text.classifier import TextClassifier
from recur.models.text.encoder import Encoder, EncoderSpec
from recur.pipeline.sentiment_fit import logits_of, padded
from recur.pipeline.sentiment_train import SentimentPlan
from recur.pipeline.text import TextCodec

FILE = "text_twitter_financial_news.parquet"
HEADLINES = 2000


def packed(net: TextClassifier, texts: list[list[int]]) -> np.ndarray:
    """Logits by the path that training takes, on batches as scoring makes them."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out = np.empty((len(texts), 3), dtype=np.float32)
    with torch.no_grad():
        at = 0
        while at < len(order):
            size = max(1, min(256, 8192 // len(texts[order[at]])))
            tokens, lengths, rows = padded(texts, np.array(order[at : at + size]))
            out[rows] = net(tokens, lengths).numpy()
            at += size
    return out


def taking_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each job, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(1 + rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    headlines = pl.read_parquet(asked.data / FILE)["text"].to_list()[:HEADLINES]
    plan = SentimentPlan()
    codec = TextCodec.train(headlines, plan.vocabulary)
    torch.manual_seed(0)
    net = TextClassifier(Encoder(EncoderSpec(codec.size, plan.width, plan.hidden, plan.layers))).eval()
    texts = [text for text in codec.encode(headlines) if text]
    apart = np.abs(packed(net, texts) - logits_of(net, texts)).max()
    jobs: dict[str, Callable[[], object]] = {
        "tokenising alone": lambda: codec.encode(headlines),
        "packed kernel, from tokens": lambda: packed(net, texts),
        "scoring kernel, from tokens": lambda: logits_of(net, texts),
        "packed kernel, from text": lambda: packed(net, [t for t in codec.encode(headlines) if t]),
        "scoring kernel, from text": lambda: logits_of(net, codec.encode(headlines)),
    }
    taken = taking_turns(jobs, asked.rounds)
    rows = [(name, f"{len(headlines) / seconds:,.0f}") for name, seconds in taken.items()]
    mean = np.mean([len(text) for text in texts])
    show(f"{len(headlines)} headlines of {mean:.1f} tokens, one thread", ("", "a second"), rows)
    print(f"largest difference of a logit: {apart:.1e}")


if __name__ == "__main__":
    main()
