"""Speed benchmarks of every op and method.

Each benchmark times several variants of one computation: the author's loop, plain PyTorch, ``torch.compile`` and ours.
It compares them with a lower bound from the bytes and FLOPs that the task needs. ``python -m bench.speed`` measures and
writes JSON records. ``python -m bench.speed.report`` makes docs/evaluation/speed.md from them.
"""
