"""Parts that the families share when they read a config.json.

family.py      Family: the interface of one model_type
values.py      checked reading of keys; every key is accounted for
keys.py        keys that never change the forward pass
kinds.py       windows and rotation of single blocks
recurrent.py   blocks that differ in their mixer, sizes of the delta rule
grouped.py     grouped experts and dense first blocks of GLM, DeepSeek and Bailing
latent.py      latent attention of DeepSeek, Mistral 4 and GLM
packing.py     quantization_config
multimodal.py  vision-language models: the text model we load
"""
