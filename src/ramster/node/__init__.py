"""One node: `node.py` builds the whole object graph on one screen; `main.py` runs it until it is told to stop."""
