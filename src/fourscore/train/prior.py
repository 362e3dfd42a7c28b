"""What a loss is worth: the loss of somebody who only knows how often each answer occurs.

A model that answers `race` in two tokens has a small loss per token whether or not it read the sentence. Set beside the
label prior, the same figure says how much was learnt from the sentence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fourscore.train.batches import Example


def label_prior_loss(training: Sequence[Example], judged: Sequence[Example]) -> float:
    """Nats per answer token on `judged` of always predicting by the answers' frequencies in `training`.

    An answer's probability is count / (n + 1); one further count belongs to all answers never seen, so an unseen answer
    costs log(n + 1) and no answer costs infinity. Whole answers are counted, then divided by their tokens.
    """
    counts = Counter(e.answer for e in training)
    total = len(training) + 1
    nats = -sum(math.log(counts.get(e.answer, 1) / total) for e in judged)
    return nats / sum(e.supervised for e in judged)
