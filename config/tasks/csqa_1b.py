# CommonsenseQA for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "csqa"
learning_rate = 5e-5
warmup_steps = 100
max_steps = 4000
batch_size = 16
