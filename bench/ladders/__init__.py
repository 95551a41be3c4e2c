"""Speed ladders: from the author's loop over the best PyTorch to ours and the physical floor.

``python -m bench.ladders`` measures and writes JSON, ``python -m bench.ladders.report`` makes a page of it.
"""
