# Standard pretraining: config/pause.py without the pauses.
pause_rate = 0.0
