# PausePT of Goyal et al. 2023, Table 5, 1B: N = 2048. The paper trains on C4 with a tokenizer it
# does not name; this takes OpenWebText and GPT-2's, so the embedding differs, and [G]'s 200 B tokens are many epochs.
pause_rate = 0.1
dataset = "openwebtext"
tokenizer = "gpt2"

block_size = 2048
n_layer = 24
n_head = 32
n_embd = 2048
n_mlp = 8092  # as printed; the table's total of 1,345,085,440 parameters is that of 8192
norm = "layer"
qk_norm = False
position = "learned"
mlp = "gelu"
tied = True
bias = True
zero_init = False

batch_size = 256
micro_batch_size = 8

optimizer = "adamw"
learning_rate = 2e-4
min_lr_ratio = 0.1
decay = "cosine"
weight_decay = 0.1
max_steps = 380_000  # 200 B tokens
warmup_steps = 2000

eval_interval = 1000
eval_blocks = 1024
checkpoint_interval = 1000
