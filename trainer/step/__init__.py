"""One training step.

targets.py            stored tensors that each block trains against
stack.py              the student's blocks, scanned
blockwise.py          blockwise mode: each block's gradient inside its own scan iteration
heads.py              both models' ends: last streams and heads
feature.py            feature mode: the student runs end to end
balance.py            load balancing in a step: router losses or bias updates
parameters.py         parameters by name, and which of them train
adapters.py           low-rank adapters before the first step
optimizer.py          AdamW with state and clipping per block
schedules.py          weights that depend on the step
program.py            interface of a mode (StepProgram), and the compiled step
blockwise_program.py  blockwise mode as a stage sees it
feature_program.py    feature mode as a stage sees it
modes.py              choice of the program
flops.py              model FLOPs of a step
"""
