"""guidance over a MobileLLM."""

import sys

from guidance import gen, models, select

from mobilellm_cpp import MobileLLM

model = models.LlamaCpp(MobileLLM(sys.argv[1], n_ctx=512, n_threads=1), echo=False)
done = model + "User: Yes or no?\nAssistant: " + select(["yes", "no"], name="answer")
assert done["answer"] in ("yes", "no")
done += " " + gen("number", regex="[0-9]{3}")
assert done["number"].isdigit() and len(done["number"]) == 3
done = model + "User: Who are you?\nAssistant:" + gen("text", max_tokens=20, stop="\n")
assert "Pip" in done["text"], done["text"]
