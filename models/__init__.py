"""One config-driven, scan-mode decoder, used as teacher and as student.

config.py       what a decoder is: sizes, rotary embedding, the plan of its layers
rope.py         rotary position embedding and its scalings
decoder.py      the decoder: stacked parameters, scanned blocks, taps
attention.py, latent_attention.py   the first sublayer      mlp.py   the second, dense or of experts
sublayer.py     norms and factors around both               parameter.py   the norm itself, soft caps
context.py      what all blocks share of the rows           kernels.py     attention proper: XLA, Pallas, cuDNN
routing.py      which experts a token goes to, and balancing their load
experts.py      how experts are computed
recorder.py     the jitted teacher forward that returns encoded taps
sharding.py     where parameters and rows lie on a mesh of devices     ambient_mesh.py  the mesh around a computation
recording_mesh.py  a teacher on a mesh, and how what it records is dealt out
surgery/        students made out of teachers: cuts, dropped blocks, experts out of MLPs
checkpoint.py   load_pretrained           fill.py        parameters from tensors, by the parts of a mesh
runs.py         a training's student as a checkpoint
maxtext.py      MaxText's checkpoints in  maxtext_names.py  their names and numbers  orbax_files.py  their arrays
maxtext_export.py  and out
export.py       save_pretrained
identity.py     the digest of a checkpoint's weights
families/       HF config.json in and out, tensor names: one module for each kind of family
tensors.py      HF tensor names and shapes
hf_files.py     the files of an HF directory, on a local disk or in a bucket
safetensors_file.py   the format: mapped files, headers in buckets, and writing
ranges.py       range reads of objects in buckets, some way ahead
packed.py       weights in few bits: MXFP4, FP8
ggufs.py        GGUF files in       gguf_config.py  their config    gguf_tokenizer.py  and tokenizer
remote_gguf.py  GGUF files in buckets
tokenizer.py    the tokenizer that comes with a checkpoint   long_text.py   a long text in windows
cache_tokenizer.py   the one that a cache keeps
chat_template.py   its chat template          chat_files.py   which of its files name that
template_worker.py, template_process.py   the process that renders it under limits
"""
