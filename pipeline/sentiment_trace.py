"""What a sentiment model reads in a text, token by token.

After each token: what the model would say if the text ended there, and which tokens the language model expects
next. The reading is the whole model's (both directions over the part read so far, and its n-grams), so that the last row
is the score of the text; the expectation uses the forward recurrence alone.
"""

from __future__ import annotations

from typing import Any

import torch

from recur.models.text.classifier import CHUNK
from recur.pipeline.labelled import CLASSES
from recur.pipeline.sentiment import SentimentModel, score_tokens
from recur.vocabulary import UsageError

TOP = 5


def trace(model: SentimentModel, text: str, top: int = TOP) -> list[dict[str, Any]]:
    """One row per token: ``token``, ``p_negative``, ``p_neutral``, ``p_positive`` of the text so far, and ``next``.

    ``next`` lists the ``top`` likeliest tokens to follow with their probabilities. Raises UsageError for a text without
    tokens and for one of more than ``CHUNK`` tokens: the table would be unreadable.
    """
    tokens = model.codec.encode([text])[0]
    if not 0 < len(tokens) <= CHUNK:
        raise UsageError(
            f"The text has {len(tokens)} tokens: expected 1 to {CHUNK}.", "Trace one sentence or headline."
        )
    so_far = [tokens[: k + 1] for k in range(len(tokens))]
    chances = score_tokens(model, so_far)
    with torch.inference_mode():
        hidden, _ = model.language.hidden(torch.tensor([tokens]), False, None)
        likely = model.language.logits(hidden[0], False).softmax(1).topk(min(top, model.codec.size))
    return [
        {
            "token": model.codec.token(token),
            **{f"p_{name}": float(chances[k, c]) for c, name in enumerate(CLASSES)},
            "next": [
                {"token": model.codec.token(int(i)), "p": float(p)}
                for i, p in zip(likely.indices[k], likely.values[k], strict=True)
            ],
        }
        for k, token in enumerate(tokens)
    ]
