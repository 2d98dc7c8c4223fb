# CoQA for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "coqa"
learning_rate = 5e-5
warmup_steps = 75
max_steps = 3500
batch_size = 16
