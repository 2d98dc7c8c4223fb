# Count the ones of a random bit string and answer their parity, with as many pauses as bits [London & Kanade 2025,
# section 5, in small]. The count in unary is a target at the pauses (`hints`). One to two minutes on a CPU.
task = "parity_16"
pauses = 16
hints = "count"

n_layer = 2
n_head = 2
n_embd = 16
n_mlp = 16
norm = "layer"
qk_norm = False
position = "learned"
mlp = "gelu"
bias = True
zero_init = False
block_size = 96

optimizer = "adamw"
learning_rate = 5e-3
beta2 = 0.999
warmup_steps = 50
max_steps = 500
batch_size = 128

eval_interval = 100
eval_blocks = 1000
checkpoint_interval = 250
