# 3SUM with a pause for each pair of numbers, whose sum is the pause's target (`hints`) [Pfau et al. 2024, in small].
# One more pause predicts the space before the answer. About a minute on a CPU.
task = "match3_6"
pauses = 16
hints = "thought"

n_layer = 4
n_head = 2
n_embd = 32
norm = "layer"
qk_norm = False
position = "learned"
mlp = "gelu"
bias = True
zero_init = False
block_size = 48

learning_rate = 0.01
matrix_learning_rate = 0.02
beta2 = 0.99
max_steps = 900
batch_size = 64

eval_interval = 300
eval_blocks = 1000
checkpoint_interval = 300
