"""outlines over a MobileLLM, with its default backend."""

import sys
from typing import Literal

import examples
import outlines
from outlines.types import Regex
from pydantic import BaseModel

from mobilellm_cpp import MobileLLM


class Answer(BaseModel):
    yes: bool
    number: Literal[1, 2, 3]


model = outlines.from_llamacpp(MobileLLM(sys.argv[1], n_ctx=512, n_threads=1))
assert model("Yes or no?", Literal["yes", "no"], max_tokens=9) in ("yes", "no")
assert model("A number:", Regex("[0-9]{3}"), max_tokens=9).isdigit()
text = model("JSON:", Answer, max_tokens=200)
assert isinstance(Answer.model_validate_json(text).yes, bool), text
assert "".join(model.stream("Yes or no?", Literal["yes", "no"], max_tokens=9)) in ("yes", "no")
examples.run("outlines", sys.argv[1])
