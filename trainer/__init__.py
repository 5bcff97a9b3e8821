"""Stage 2: a cache to a trained student.

train.py        a training from its config to its result
loop.py         steps, evaluations and checkpoints of a run, one after the other
losses.py       pure losses, each a sum and its weight
head_losses.py  exact losses over the whole vocabulary, from streams and heads
feed/           batches: cached rows, or a teacher in the loop
terms/          the terms of the loss
step/           one training step
run/            a run: student, checkpoints, metrics, evaluation
mesh/           placement of state and batches on devices
"""
