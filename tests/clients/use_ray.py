"""Ray Data: texts embedded and scored by actors, each of which has the model.

Prints the lines/s of 1 and 2 actors of one thread each: use_ray.py MODEL [LINES].
"""

import logging
import sys
import time

import numpy as np
import ray

from mobilellm_cpp import MobileLLM


class Embed:
    def __init__(self, path):
        self.llm = MobileLLM(path, n_threads=1)

    def __call__(self, batch):
        began = time.time()
        vectors = self.llm.embeddings(list(batch["text"]))
        times = np.tile([began, time.time()], (len(vectors), 1))
        return {**batch, "vector": vectors, "times": times}


class Score:
    """The mean log probability of a text's tokens."""

    def __init__(self, path):
        self.llm = MobileLLM(path, n_threads=1)

    def __call__(self, batch):
        return {**batch, "score": np.array([self.score(text) for text in batch["text"]])}

    def score(self, text):
        tokens = self.llm.tokenize(text.encode())
        logits = self.llm.logits(tokens)[:-1].astype(np.float64)
        likely = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return likely[np.arange(len(tokens) - 1), tokens[1:]].mean()


path, n = sys.argv[1], int((sys.argv[2:] or [256])[0])
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
texts = [" ".join(WORDS[(i * j) % 9] for j in range(1, 9)) + f" {i}" for i in range(n)]
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
logging.getLogger("ray.data").setLevel(logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = [{"number": number, "text": text} for number, text in enumerate(texts)]


def run(actor, actors, rows):
    """The rows in order."""
    data = ray.data.from_items(rows, override_num_blocks=8)
    pool = ray.data.ActorPoolStrategy(size=actors)
    mapped = data.map_batches(actor, fn_constructor_args=(path,), batch_size=32, compute=pool)
    return sorted(mapped.take_all(), key=lambda row: row["number"])


with MobileLLM(path, n_threads=1) as llm:
    vectors = llm.embeddings(texts)
    scorer = Score(path)
    for actors in (1, 2):
        found = run(Embed, actors, rows)
        times = np.array([row["times"] for row in found])
        rate = n / (times.max() - times.min())  # without the actors' start
        assert np.array_equal(np.array([row["vector"] for row in found]), vectors)
        print(f"{n} lines, {actors} actors: {rate:.0f} lines/s", flush=True)
    found = run(Score, 2, rows[:32])
    assert [row["score"] for row in found] == [scorer.score(text) for text in texts[:32]]
