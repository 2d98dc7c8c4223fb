# Pause finetuning [Goyal et al. 2023, Algorithm 2] of the model in init_from on a task. --recipe=gsm8k_1b has the
# paper's learning rate, steps and batch for it (nanopause/recipes.py). --pauses=0 is standard finetuning.
pauses = 10
pause_position = "append"
attention = "prefix"  # as in the paper; a server that knows causal attention alone wants "causal"
block_size = 0  # the model's

optimizer = "adamw"
learning_rate = 1e-4
warmup_steps = 100
max_steps = 5_000
batch_size = 16
micro_batch_size = 16

eval_interval = 250
eval_blocks = 512
checkpoint_interval = 250
