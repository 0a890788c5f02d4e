"""Training: trainer.py has the step as one reads it, cpu_trainer.py with workers.py and gpu_trainer.py have it fast;
loop.py evaluates, logs and saves. start.py puts a run together, session.py runs it, run_folder.py keeps it.
"""
