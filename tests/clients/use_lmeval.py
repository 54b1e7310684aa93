"""lm-eval's model `gguf`, which asks a server for log probabilities."""

import sys

from lm_eval.api.instance import Instance
from lm_eval.models.gguf import GGUFLM
from serving import server

with server(sys.argv[1], "--logits_all", "true") as address:
    model = GGUFLM(base_url=address)
    asked = "User: Who are you?\nAssistant:"
    pairs = [(asked, " I am Pip."), (asked, " zebra zebra.")]
    right, wrong = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    )
    assert right[0] > wrong[0], (right, wrong)
    request = Instance("generate_until", {}, (asked, {"until": ["\n"], "max_gen_toks": 20}), 0)
    assert model.generate_until([request])[0].strip()
