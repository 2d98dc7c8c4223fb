# WebQuestions for the model of config/pause_1b.py [Goyal et al. 2023]; after config/finetune.py.
task = "webq"
learning_rate = 5e-4
warmup_steps = 200
max_steps = 2000
batch_size = 16
