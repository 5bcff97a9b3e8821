"""A configurable decoder in scan mode, used as teacher and as student, and the checkpoints that it is loaded from.

config.py      ModelConfig: sizes, positions, layer plan
decoder.py     Decoder: stacked parameters, scanned blocks, taps as return values
head.py        last norm and LM head: from the last stream to logits
layers/        sublayers of a block
routing.py     expert selection, and the formulas of load balancing
recorder.py    compiled teacher forward that returns encoded taps
topk.py        top-k logits without a full batch of logits in memory
adapters.py    low-rank adapters: names, sizes, and what they add
checkpoint.py  load_pretrained and save_pretrained
files/         checkpoint formats
families/      one module per model family: config.json and tensor names
text/          tokenizers and chat templates
surgery/       students made from teachers
mesh/          sharding of parameters and rows over devices
describe.py    facts about teacher, rows and machine that a plan records
"""
