# HellaSwag for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "hellaswag"
learning_rate = 5e-6
warmup_steps = 100
max_steps = 1000
batch_size = 16
