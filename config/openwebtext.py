# GPT-2 124M on OpenWebText, T = 1024, 0.49 M tokens a step: data and size, for config/pause.py or config/standard.py.
# First: python data/openwebtext.py
dataset = "openwebtext"
tokenizer = "gpt2"

block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
norm = "layer"
qk_norm = False
position = "learned"
mlp = "gelu"
tied = True
bias = False
zero_init = False

batch_size = 480
micro_batch_size = 30

optimizer = "adamw"
learning_rate = 6e-4
min_lr_ratio = 0.1
decay = "cosine"
max_steps = 18_000  # 8.8 B tokens, about one epoch
warmup_steps = 700
weight_decay = 0.1

eval_interval = 500
eval_blocks = 1024
checkpoint_interval = 500
