"""The chat of the terminal: its conversation and where it is kept, its commands, and how it looks.

`talk.py` is what a session knows and does, `storage.py` keeps it, `answering.py` makes an answer
that can be stopped, `commands.py` is the table of commands; `terminal.py` asks, `view.py` and
`markdown.py` show.
"""
