"""One config-driven, scan-mode decoder, used as teacher and as student.

config.py       what a decoder is: sizes, rotary embedding, the plan of its layers
rope.py         rotary position embedding and its scalings
decoder.py      the decoder: stacked parameters, scanned blocks, taps
routing.py      which experts a token goes to, and balancing their load
experts.py      how experts are computed
recorder.py     the jitted teacher forward that returns encoded taps
surgery.py      students cut out of teachers
checkpoint.py   load_pretrained and save_pretrained
families/       HF config.json in and out, tensor names: one module for each kind of family
tensors.py      HF tensor names, shapes and safetensors files
ggufs.py        GGUF files in
tokenizer.py    the tokenizer that comes with a checkpoint
"""
