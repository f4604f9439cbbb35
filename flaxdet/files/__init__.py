"""Files: downloads, checkpoints, models, and folders for the Hugging Face Hub."""
