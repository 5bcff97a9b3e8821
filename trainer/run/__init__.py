"""A training run.

folder.py       the run's folder: owner, lock, description
stages.py       stages of a run
idle_settings.py  settings that no stage would use
student.py      the initial student
importance.py   importance of the teacher's parts on cached rows
stage.py        one stage: planned, and ready to step
evaluate.py     figures of a student on held-out rows
held_out.py     predictions on held-out rows
exact.py        the same against the teacher's whole distribution
divergence.py   runs that diverged or ended worse than they began
yardstick.py    the teacher on the held-out rows, and the share of the gap closed
metrics.py      names of measured quantities
metrics_log.py  metrics.jsonl and TensorBoard
checkpoints.py  checkpoints of a run
profile.py      traces for TensorBoard or Perfetto
"""
