# DIT [Kim et al. 2025]: finetuning of the model in init_from with a pause before each of the five least likely tokens
# of a target, found again every step. --recipe=gsm8k_dit, aqua_dit or mbpp_dit has the paper's learning rate, steps and
# batch for the task (nanopause/recipes.py). --placement=sft, ran, appd and aaw are the paper's baselines. Nothing is
# inserted at inference (appd: its pauses).
placement = "dit"
pauses = 5
attention = "causal"
block_size = 0  # the model's

optimizer = "adamw"
learning_rate = 1e-5
warmup_steps = 100
max_steps = 5_321  # three epochs of GSM8K
batch_size = 4
micro_batch_size = 4

eval_interval = 250
eval_blocks = 512
checkpoint_interval = 250
