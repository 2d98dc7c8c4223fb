# GPT-2's architecture and recipe, at whatever size: python train.py config/pause.py config/gpt2.py
norm = "layer"
qk_norm = False
position = "learned"
mlp = "gelu"
tied = True
bias = True
zero_init = False

optimizer = "adamw"
learning_rate = 1e-3
min_lr_ratio = 0.1
decay = "cosine"
weight_decay = 0.1
